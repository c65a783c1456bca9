"""goc-eval."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from goc_deploy.cli.app import print_table, run_command
from goc_deploy.cli.options import (
    PATH,
    SETTINGS,
    backend_option,
    cfg_scale_option,
    debug_option,
    device_option,
    output_option,
    plans_of_directory,
    sort_outputs,
    threads_option,
    verbose_option,
    version_option,
)
from goc_deploy.cli.progress import progress_bar
from goc_deploy.options import PRESETS, EvalOptions

DEFAULTS = EvalOptions()
EPILOG = "Example: goc-eval engine --num-images 2000 --features classifier.onnx --reference digits.npz --html report.html"


@click.command("goc-eval", context_settings=SETTINGS, epilog=EPILOG)
@click.argument("engine_dir", type=PATH)
@click.option(
    "--plan",
    "plans",
    multiple=True,
    shell_complete=plans_of_directory,
    help="Plan to evaluate, repeatable.  [default: all]",
)
@click.option(
    "--preset",
    type=click.Choice(PRESETS),
    help="Rows and columns of Table 1 of GOC's paper, in place of --plan: no cache, FORA at 50 and 25 %, each also with GC and GOC. "
    "Plans that ENGINE_DIR lacks are added to it.",
)
@click.option(
    "--router", type=PATH, help="With --preset: Learning-to-Cache router (.pt) for three rows more."
)
@click.option(
    "--num-images",
    type=click.IntRange(1, 1_000_000),
    default=DEFAULTS.num_images,
    help="Images per plan.",
)
@click.option(
    "--seed", type=int, default=DEFAULTS.seed, help="Seed of noise, labels and resampling."
)
@cfg_scale_option(DEFAULTS.cfg_scale, "Classifier-free guidance scale; 1 is none.")
@click.option(
    "--cfg-channels",
    type=click.IntRange(0),
    default=DEFAULTS.cfg_channels,
    help="Guidance acts on so many channels only, the first ones.  [default: as in the model's reference]",
)
@click.option(
    "--labels",
    type=click.Choice(["balanced", "iid"]),
    default=DEFAULTS.labels,
    help="Every class equally often in random order, or each label drawn alone.",
)
@click.option(
    "--features", metavar="MODEL.onnx|inception", help="Feature extractor for FID and the like."
)
@click.option(
    "--inception-weights",
    type=PATH,
    help="torch-fidelity's weights file, for --features inception.",
)
@click.option("--reference", type=PATH, help="ADM .npz to compare the distribution with.")
@click.option(
    "--converged",
    type=click.IntRange(0, 1000),
    default=DEFAULTS.converged,
    help="Also measure the distance to a solution of so many uncached steps; 0 does not.",
)
@click.option(
    "--converged-images",
    type=click.IntRange(1),
    default=DEFAULTS.converged_images,
    help="Images that this solution is made of.",
)
@click.option(
    "--trajectory-images",
    type=click.IntRange(0),
    default=DEFAULTS.trajectory_images,
    help="Images whose error is followed over the steps.",
)
@click.option(
    "--resamples",
    type=click.IntRange(0),
    default=DEFAULTS.resamples,
    help="Bootstrap resamples of FID and inception score.",
)
@click.option(
    "--grid-images",
    type=click.IntRange(1),
    default=DEFAULTS.grid_images,
    help="Pictures per plan in the report.",
)
@click.option(
    "--samples",
    type=PATH,
    help="Folder of --samples-output to read images from instead of generating.",
)
@click.option("--samples-output", type=PATH, help="Folder for an ADM .npz per plan.")
@output_option("File to write, repeatable: .json is --json, .html is --html.")
@click.option("--json", "json_path", type=PATH, help="File for every number.")
@click.option(
    "--html",
    "html_path",
    type=PATH,
    help="File for the report, which needs no other file and no network.",
)
@backend_option
@device_option
@click.option(
    "--batch-size",
    type=click.IntRange(0),
    default=DEFAULTS.batch_size,
    help="Images per run; 0 is what the engine was exported for.",
)
@threads_option
@verbose_option
@debug_option
@version_option
def command(
    engine_dir: Path,
    json_path: Path | None,
    html_path: Path | None,
    outputs: tuple[Path, ...],
    **options: Any,
) -> None:
    """Compare the plans of ENGINE_DIR with no cache on the same noise and labels, and with a reference set."""
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
        click.echo(f"warning: {warning}", err=True)
    if json_path:
        save_text(dump_json(evaluation.report), json_path)
    if html_path:
        save_text(page(evaluation, str(engine_dir.name)), html_path)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of goc-eval."""
    return run_command(command, argv)
