"""goc-bench."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import click

from goc_deploy.cli.app import print_table, run_command
from goc_deploy.cli.options import (
    PATH,
    SETTINGS,
    backend_option,
    cfg_scale_option,
    common_options,
    compared_plans,
    device_option,
    history_option,
    output_option,
    sort_outputs,
    threads_option,
    whole_numbers,
)
from goc_deploy.cli.progress import progress_bar
from goc_deploy.options import BenchOptions

DEFAULTS = BenchOptions()


@click.command(
    "goc-bench",
    context_settings=SETTINGS,
    epilog="Example: goc-bench engine --plan none --plan fora:2 --plan fora:2+gc:1.2 "
    "--json bench.json",
)
@compared_plans("Plan to compare, repeatable; the first is the baseline.  [default: all plans]")
@click.option(
    "--labels",
    callback=whole_numbers,
    default=",".join(map(str, DEFAULTS.labels)),
    help="Labels separated by commas, one per image; all images run as one batch.",
)
@cfg_scale_option()
@click.option(
    "--repeats",
    type=click.IntRange(1),
    default=DEFAULTS.repeats,
    help="Number of measured rounds; every round runs every plan once.",
)
@click.option(
    "--warmup",
    type=click.IntRange(0),
    default=DEFAULTS.warmup,
    help="Number of rounds before them that are not measured; a GPU runs twice as many.",
)
@backend_option
@device_option
@history_option
@threads_option
@output_option("File to write, repeatable: .json is --json, .png, .svg or .pdf is --plot.")
@click.option("--json", "json_path", type=PATH, help="JSON file to write every measurement to.")
@click.option(
    "--profile",
    type=PATH,
    help="File to write a Chrome trace to: the steps and launches of one more run of each plan "
    "(open it at ui.perfetto.dev).",
)
@click.option(
    "--plot",
    type=PATH,
    help="File to write a plot of step times to; it needs the plot extra.",
)
@common_options
def command(
    engine_dir: Path,
    json_path: Path | None,
    profile: Path | None,
    plot: Path | None,
    outputs: tuple[Path, ...],
    **options: Any,
) -> None:
    """Measure plans side by side: rounds are interleaved, times are medians."""
    from goc_deploy.api.bench import compare_plans, summary_rows
    from goc_deploy.cli.paths import check_suffix, check_writable
    from goc_deploy.disk import save_text
    from goc_deploy.trace import Span, chrome_trace, totals_ms

    json_path, plot = sort_outputs(outputs, {(".json",): json_path, (".png", ".svg", ".pdf"): plot})
    check_suffix(plot, ".png", ".svg", ".pdf", what="--plot ends in .png, .svg or .pdf")
    for path in (json_path, profile, plot):
        check_writable(path)
    spans: dict[str, list[Span]] | None = {} if profile else None
    with progress_bar() as progress:
        comparison = compare_plans(engine_dir, BenchOptions(**options), progress, spans)
    plans = comparison["plans"]
    first = next(iter(plans.values()))
    print_table(
        f"{first['backend']} {first['version']}, threads {first['threads']}, "
        f"{first['images']} images, {first['precision']}, "
        f"medians of {options['repeats']} interleaved rounds after {options['warmup']}",
        *summary_rows(comparison),
    )
    if profile and spans:
        save_text(json.dumps(chrome_trace(spans)), profile)
        for name, entry in plans.items():
            entry["profile_ms"] = totals_ms(spans[name])
        _print_profile(plans)
    if json_path:
        save_text(json.dumps(comparison, indent=1) + "\n", json_path)
    if plot:
        from goc_deploy.display.plots import plot_step_times

        step_times = [(name, entry["step_ms"]) for name, entry in plans.items()]
        plot_step_times(step_times, str(engine_dir), plot)


def _print_profile(plans: dict[str, dict[str, Any]]) -> None:
    """Print the milliseconds of each kind of span of the profiled runs."""
    kinds = sorted({kind for entry in plans.values() for kind in entry["profile_ms"]})
    rows = [
        [name, *(f"{entry['profile_ms'].get(kind, 0):.2f}" for kind in kinds)]
        for name, entry in plans.items()
    ]
    print_table("milliseconds of the profiled run, by what ran", ["plan", *kinds], rows)


main = partial(run_command, command)  # entry point of goc-bench

if __name__ == "__main__":
    raise SystemExit(main())
