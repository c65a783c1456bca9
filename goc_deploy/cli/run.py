"""goc-run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from goc_deploy.cli.app import run_command
from goc_deploy.cli.options import (
    PATH,
    SETTINGS,
    backend_option,
    cfg_scale_option,
    debug_option,
    device_option,
    plans_of_directory,
    steps_option,
    threads_option,
    verbose_option,
    version_option,
)
from goc_deploy.cli.progress import progress_bar
from goc_deploy.options import GenerateOptions

if TYPE_CHECKING:
    from goc_deploy.api.series import Series
    from goc_deploy.runtime.pipeline import Pipeline

DEFAULTS = GenerateOptions()


@click.command(
    "goc-run",
    context_settings=SETTINGS,
    epilog="Example: goc-run engine --labels 207,360 --cfg-scale 4.0 --output images.png",
)
@click.argument("engine_dir", type=PATH)
@click.option(
    "--plan",
    shell_complete=plans_of_directory,
    help="Name of a plan of the engine, or any SPEC that does not learn from images, which is compiled for this run.  "
    "[default: the first plan that caches]",
)
@steps_option(
    None,
    "Sampling steps. Others than the plan's are compiled for this run.  [default: those of the plan]",
)
@click.option(
    "--labels",
    help="Class labels, one per image: numbers, or class names of the model's folder; which captions, for a model of captions.  "
    "[default: 0,1,2,... over the classes]",
)
@click.option(
    "--prompt",
    "prompts",
    multiple=True,
    help="A text to draw, repeatable, where the engine has a text encoder.",
)
@click.option(
    "--negative-prompt",
    "negatives",
    multiple=True,
    help="What to draw away from: once, or once per --prompt.",
)
@click.option(
    "--prompt-embeds",
    "embeds_file",
    type=PATH,
    help="Captions to draw, .npz or .safetensors: prompt_embeds [N,L,C], prompt_attention_mask, negative_prompt_embeds, ...",
)
@click.option(
    "--num-images",
    type=click.IntRange(1, 1_000_000),
    help="Images; labels are repeated in order.  [default: one per label, or 8]",
)
@cfg_scale_option(DEFAULTS.cfg_scale, "Classifier-free guidance scale; 1 is none.")
@click.option(
    "--cfg-channels",
    type=click.IntRange(0),
    default=DEFAULTS.cfg_channels,
    help="Guidance acts on so many channels only, the first ones.  [default: as in the model's reference]",
)
@click.option(
    "--seed",
    type=int,
    default=DEFAULTS.seed,
    help="Seed of the noise; image i depends on (seed, i) alone.",
)
@click.option(
    "--latents",
    "latents_file",
    type=PATH,
    help="x_T, float32 [N,C,H,W] .npy, instead of seeded noise.",
)
@click.option(
    "-o",
    "--output",
    type=PATH,
    help="File or directory for the images: .png is a grid, .npz the ADM format with labels, another name is a directory of pictures, "
    "each of which is written when it is drawn.  [default: goc-DATE-TIME.png, if no other output is given]",
)
@click.option(
    "--resume",
    is_flag=True,
    help="Keep the pictures that an interrupted run left in the --output directory, and draw the others.",
)
@click.option("--latents-output", type=PATH, help="Final latents, .npy [N,C,H,W].")
@click.option("--trajectory-output", type=PATH, help="Latents after every step, .npy [T,N,C,H,W].")
@click.option(
    "--report", type=PATH, help="JSON report: time and kind of every step, cache bytes, versions."
)
@backend_option
@device_option
@click.option(
    "--cuda-graphs/--no-cuda-graphs",
    default=True,
    help="Record CUDA graphs the second time that a step runs; off, for debugging.",
)
@click.option(
    "--batch-size", type=int, help="Images per run.  [default: what the engine was exported for]"
)
@threads_option
@verbose_option
@debug_option
@version_option
def command(
    engine_dir: Path,
    labels: str | None,
    prompts: tuple[str, ...],
    negatives: tuple[str, ...],
    embeds_file: Path | None,
    num_images: int | None,
    latents_file: Path | None,
    output: Path | None,
    latents_output: Path | None,
    trajectory_output: Path | None,
    report: Path | None,
    resume: bool,
    seed: int,
    cfg_scale: float,
    cfg_channels: int | None,
    **loading: Any,
) -> None:
    """Generate images from an engine directory.

    Without an output, the images become a picture with a dated name in the current folder. What is written is printed.
    """
    from goc_deploy import disk
    from goc_deploy.api.facade import load
    from goc_deploy.api.series import Series
    from goc_deploy.cli import paths
    from goc_deploy.conditions.captions import prompt_embeds_from_arrays
    from goc_deploy.conditions.labels import labels_from_text, spread_labels
    from goc_deploy.conditions.tensor_files import arrays_from_file
    from goc_deploy.errors import UsageError

    paths.check_suffix(
        output,
        "",
        ".png",
        ".npz",
        what="--output ends in .png or .npz, or has no suffix and is a directory",
    )
    if resume and (output is None or output.suffix or latents_output or trajectory_output):
        raise UsageError("--resume goes with --output DIRECTORY, and with no output of latents")
    if not (output or latents_output or trajectory_output or report):
        output = paths.dated_picture()
    paths.check_writable(output, may_be_folder=True)
    for path in (latents_output, trajectory_output, report):
        paths.check_writable(path)
    paths.check_distinct(
        output=output,
        latents_output=latents_output,
        trajectory_output=trajectory_output,
        report=report,
    )
    latents = paths.read_latents(latents_file)
    if bool(prompts) + (embeds_file is not None) > 1 or (negatives and not prompts):
        raise UsageError(
            "give --prompt or --prompt-embeds, not both; --negative-prompt goes with --prompt"
        )
    arrays = None if embeds_file is None else arrays_from_file(embeds_file)
    with load(engine_dir, **loading) as pipe:
        captions = (
            None
            if arrays is None
            else prompt_embeds_from_arrays(arrays, pipe.spec, str(embeds_file))
        )
        if prompts:
            captions = pipe.encode(prompts, negatives or ("",))
        rows = None if labels is None else labels_from_text(labels, pipe.manifest.class_names)
        if captions is not None and rows is None:
            rows = tuple(range(len(captions.prompts)))
        count = num_images or (None if latents is None else len(latents))
        chosen = spread_labels(rows, count, pipe.spec.classes)
        series = Series(chosen, GenerateOptions(seed, cfg_scale, cfg_channels), captions, latents)
        series.check(pipe)
        files = {"latents": latents_output, "trajectory": trajectory_output}
        described = _draw(
            pipe, series, series.records(pipe, prompts, negatives), output, files, resume=resume
        )
    if described is None:
        click.echo(f"all {len(chosen)} images are there", err=True)
    else:
        _tell(described)
    if report and described is not None:
        disk.save_text(json.dumps(described, indent=1) + "\n", report)
    if output and pipe.manifest.image_side is None:
        output = None if latents_output else output.with_suffix(".npy")
    for path in (
        output,
        latents_output,
        trajectory_output,
        report if described is not None else None,
    ):
        if path:
            click.echo(path)


def _draw(
    pipe: Pipeline,
    series: Series,
    records: list[dict[str, Any]],
    output: Path | None,
    arrays: dict[str, Path | None],
    *,
    resume: bool,
) -> dict[str, Any] | None:
    """Draw what is not there yet and write it; the report, or None where all was there."""
    import numpy as np

    from goc_deploy import disk
    from goc_deploy.api.series import joined_report
    from goc_deploy.errors import UsageError
    from goc_deploy.runtime.picture_files import PictureFiles, finished_pictures

    draws = pipe.manifest.image_side is not None
    if resume and not draws:
        raise UsageError(
            "--resume continues pictures, and the model makes latents; export with --vae"
        )
    start = finished_pictures(output, records) if resume and output else 0
    latents, trajectories, reports = [], [], []
    needs_latents = arrays["latents"] is not None or not draws
    with ExitStack() as stack:
        files = (
            stack.enter_context(PictureFiles(output, series.labels, records))
            if output and draws
            else None
        )
        progress = stack.enter_context(progress_bar())
        for first, result in series.results(
            pipe, start, progress, trajectory=arrays["trajectory"] is not None
        ):
            reports.append(result.report)
            if files is not None and result.images is not None:
                files.add(first, result.images)
            if needs_latents:
                latents.append(result.latents)
            if result.trajectory is not None:
                trajectories.append(result.trajectory)
    if arrays["latents"]:
        disk.save_array(np.concatenate(latents), arrays["latents"])
    if arrays["trajectory"]:
        disk.save_array(np.concatenate(trajectories, axis=1), arrays["trajectory"])
    if not draws:
        click.echo(
            f"the model makes {pipe.spec.channels}-channel latents, which need a VAE to become images; export with --vae, or use --latents-output",
            err=True,
        )
        if output and not arrays["latents"]:
            disk.save_array(np.concatenate(latents), output.with_suffix(".npy"))
            click.echo(
                f"wrote the latents to {output.with_suffix('.npy')} instead of images", err=True
            )
    return joined_report(reports) if reports else None


def _tell(described: dict[str, Any]) -> None:
    click.echo(
        f"{described['images']} images with plan {described['plan']} on {described['backend']} {described['version']} ({described['provider']}"
        f"{'; -v tells why no faster backend' if described['passed_over'] else ''}), "
        f"{described['computed_units']} of {described['all_units']} units computed, {described['total_ms'] / 1e3:.2f} s",
        err=True,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of goc-run."""
    return run_command(command, argv)
