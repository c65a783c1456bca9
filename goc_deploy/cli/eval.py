"""goc-eval."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from goc_deploy.cli.app import print_table, run_command
from goc_deploy.cli.flags import with_flags
from goc_deploy.cli.options import (
    PATH,
    SETTINGS,
    backend_option,
    cfg_channels_option,
    cfg_scale_option,
    common_options,
    compared_plans,
    device_option,
    output_option,
    sort_outputs,
    threads_option,
)
from goc_deploy.cli.progress import progress_bar
from goc_deploy.options import PRESETS, EvalOptions

DEFAULTS = EvalOptions()
EPILOG = (
    "Example: goc-eval engine --num-images 2000 --features classifier.onnx "
    "--reference digits.npz --html report.html"
)


@click.command("goc-eval", context_settings=SETTINGS, epilog=EPILOG)
@compared_plans("Plan to evaluate, repeatable.  [default: all plans]")
@click.option(
    "--preset",
    type=click.Choice(PRESETS),
    help="Table of the literature whose plans are evaluated, in place of --plan. paper is Table 1 "
    "of GOC's paper: no cache, FORA at 50 and 25 %, each also with GC and GOC. Plans that "
    "ENGINE_DIR lacks are added to it.",
)
@click.option(
    "--router",
    type=PATH,
    help="Learning-to-Cache router (.pt) that adds three rows to the table of --preset.",
)
@click.option(
    "--num-images",
    type=click.IntRange(1, 1_000_000),
    default=DEFAULTS.num_images,
    help="Number of images per plan.",
)
@click.option(
    "--seed",
    type=int,
    default=DEFAULTS.seed,
    help="Seed of the noise, the labels and the resampling.",
)
@cfg_scale_option()
@cfg_channels_option
@click.option(
    "--labels",
    type=click.Choice(["balanced", "iid"]),
    default=DEFAULTS.labels,
    help="Distribution of the labels: balanced is every class equally often in random order, iid "
    "is each label independently of the others.",
)
@click.option(
    "--features",
    metavar="MODEL.onnx|inception",
    help="Feature extractor that FID and the other metrics of a distribution are computed with.",
)
@click.option(
    "--inception-weights",
    type=PATH,
    help="Weights file of torch-fidelity for --features inception.",
)
@click.option(
    "--reference", type=PATH, help="ADM file (.npz) whose images the distribution is compared with."
)
@click.option(
    "--converged",
    type=click.IntRange(0, 1000),
    default=DEFAULTS.converged,
    help="Also compare with a converged solution of this many uncached steps (0: skip).",
)
@click.option(
    "--converged-images",
    type=click.IntRange(1),
    default=DEFAULTS.converged_images,
    help="Number of images of the converged solution.",
)
@click.option(
    "--full-precision",
    type=PATH,
    metavar="ENGINE_DIR",
    help="Engine directory with the same plans whose weights are not quantised. All plans are "
    "compared with its uncached plan, and its plans are the rows PLAN@full.",
)
@click.option(
    "--trajectory-images",
    type=click.IntRange(0),
    default=DEFAULTS.trajectory_images,
    help="Number of images whose error is measured after every step.",
)
@click.option(
    "--resamples",
    type=click.IntRange(0),
    default=DEFAULTS.resamples,
    help="Number of bootstrap resamples of FID and inception score.",
)
@click.option(
    "--samples",
    type=PATH,
    help="Folder of an earlier --samples-output, whose images are read instead of generated.",
)
@click.option("--samples-output", type=PATH, help="Folder to write an ADM file per plan to.")
@output_option("File to write, repeatable: .json is --json, .html is --html.")
@click.option("--json", "json_path", type=PATH, help="JSON file to write every number to.")
@click.option(
    "--html",
    "html_path",
    type=PATH,
    help="HTML file to write the report to; it needs no other file and no network.",
)
@backend_option
@device_option
@click.option(
    "--batch-size",
    type=click.IntRange(0),
    default=DEFAULTS.batch_size,
    help="Number of images per batch; 0 is the --max-batch of the export.",
)
@threads_option
@common_options
def command(
    engine_dir: Path,
    json_path: Path | None,
    html_path: Path | None,
    outputs: tuple[Path, ...],
    **options: Any,
) -> None:
    """Compare the plans of ENGINE_DIR with no cache and with a reference set.

    All plans draw the same labels from the same noise.
    """
    from goc_deploy.cli.paths import check_folder, check_writable
    from goc_deploy.disk import save_text
    from goc_deploy.evaluation.evaluate import evaluate
    from goc_deploy.evaluation.page import page
    from goc_deploy.evaluation.tables import cost_rows, distribution_rows
    from goc_deploy.strict_json import dump_json

    chosen = EvalOptions(**options)
    json_path, html_path = sort_outputs(
        outputs, {(".json",): json_path, (".html", ".htm"): html_path}
    )
    for path in (json_path, html_path):
        check_writable(path)
    check_folder(chosen.samples_output)
    with progress_bar() as progress:
        evaluation = evaluate(engine_dir, chosen, progress)
    if evaluation.report["added_plans"]:
        click.echo(
            f"added to {engine_dir}: {', '.join(evaluation.report['added_plans'])}", err=True
        )
    title = f"{evaluation.report['images']} images per plan; +- is half of a 95 % interval"
    for columns, rows in (cost_rows(evaluation.report), distribution_rows(evaluation.report)):
        if rows:
            print_table(title, columns, rows)
    for warning in evaluation.report["warnings"]:
        click.echo(f"warning: {with_flags(warning)}", err=True)
    if json_path:
        save_text(dump_json(evaluation.report), json_path)
    if html_path:
        save_text(page(evaluation, str(engine_dir.name)), html_path)


main = partial(run_command, command)  # entry point of goc-eval

if __name__ == "__main__":
    raise SystemExit(main())
