"""goc-run."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from goc_deploy.cli.app import run_command
from goc_deploy.cli.options import (
    PATH,
    SETTINGS,
    Size,
    SkipScale,
    backend_option,
    cfg_channels_option,
    cfg_scale_option,
    common_options,
    device_option,
    history_option,
    plans_of_directory,
    steps_option,
    threads_option,
)
from goc_deploy.cli.progress import progress_bar
from goc_deploy.cli.shards import shard_options, summary, take_shard_options
from goc_deploy.guidance import SKIP_START, SKIP_STOP
from goc_deploy.options import MAX_FRAMES_PER_SECOND, OFFLOADS, RunOptions, ShardOptions

if TYPE_CHECKING:
    from goc_deploy.api.run import RunResult

DEFAULTS = RunOptions()


@click.command(
    "goc-run",
    context_settings=SETTINGS,
    epilog="Example: goc-run engine --labels 207,360 --cfg-scale 4.0 --output images.png",
)
@click.argument("engine_dir", type=PATH)
@click.option(
    "--plan",
    shell_complete=plans_of_directory,
    help="Name of a plan of the engine directory, or any SPEC that does not learn from images, "
    "which is compiled for this run.  [default: the first plan that caches]",
)
@steps_option(
    None,
    "Number of sampling steps. If it is not that of the plan, the plan is compiled for this run.  "
    "[default: that of the plan]",
)
@click.option(
    "--labels",
    help="Labels separated by commas, one per image: numbers, or class names of the model's "
    "folder. If prompts or stored captions are drawn, a label selects one of them.  "
    "[default: 0,1,2,... over the classes]",
)
@click.option(
    "--prompt",
    "prompts",
    multiple=True,
    help="Text to draw, repeatable. The engine directory must have a text encoder.",
)
@click.option(
    "--negative-prompt",
    "negative_prompts",
    multiple=True,
    help="Text to draw away from: given once, or once per --prompt.",
)
@click.option(
    "--prompt-embeds",
    type=PATH,
    help="File of prompt embeddings to draw, .npz or .safetensors: prompt_embeds [N,L,C], and if "
    "there are such prompt_attention_mask, negative_prompt_embeds, negative_prompt_attention_mask, "
    "pooled_prompt_embeds [N,P], negative_pooled_prompt_embeds.",
)
@click.option(
    "--num-images",
    type=click.IntRange(1, 1_000_000),
    help="Number of images; labels are repeated in order.  [default: one per label, or 8]",
)
@cfg_scale_option()
@cfg_channels_option
@click.option(
    "--guidance",
    type=float,
    help="Guidance scale that a distilled model embeds, such as FLUX.1-dev, whose pipeline in "
    "diffusers names it guidance_scale.  [default: 3.5]",
)
@click.option(
    "--cfg-scale-2",
    "--guidance-scale-2",
    "cfg_scale_2",
    type=float,
    help="Guidance scale of the second set of weights of a model that has two, such as Wan 2.2 "
    "A14B.  [default: that of --cfg-scale]",
)
@click.option(
    "--skip-layer-guidance",
    type=SkipScale(),
    help="Scale of skip-layer guidance, such as 2.8, if the export has --skip-guidance-layers. It "
    "acts in the steps after the share START of all steps and before STOP.  "
    f"[default: none; START:STOP {SKIP_START:g}:{SKIP_STOP:g}]",
)
@click.option(
    "--seed",
    type=int,
    default=DEFAULTS.seed,
    help="Seed of the noise; image i depends on (seed, i) alone.",
)
@click.option(
    "--latents",
    type=PATH,
    help="File of x_T in place of seeded noise, float32 [N,C,H,W] .npy, or [N,C,F,H,W] for videos.",
)
@click.option(
    "--reference-latents",
    type=PATH,
    help="File of the images to edit, .npz or .safetensors, for a model that edits images: "
    "reference_latents [N,C,H,W] from the encoder of its VAE, and of further reference images "
    "reference_latents_2 and so on. One row in place of N is for all images.",
)
@click.option(
    "--size",
    type=Size(),
    help="Width and height in pixels, if the export has --size or --max-size.  "
    "[default: the usual size of the export]",
)
@click.option(
    "--frames",
    type=click.IntRange(1),
    help="Number of frames of a video.  [default: the usual number of the export]",
)
@click.option(
    "--fps",
    type=click.FloatRange(0, MAX_FRAMES_PER_SECOND, min_open=True),
    default=DEFAULTS.fps,
    help="Frames per second of the videos that are written.",
)
@click.option(
    "-o",
    "--output",
    type=PATH,
    help="File or directory of the images: .png is a grid, .npz the ADM format with labels. "
    "Another name is a directory of images, each of which is written when it is drawn. Videos are "
    "written to .mp4, .webp, or a directory of their frames.  "
    "[default: goc-DATE-TIME.png, or .webp of videos, if no other output is given]",
)
@click.option(
    "--resume",
    is_flag=True,
    help="Keep the images that an interrupted run left in the --output directory, and draw the "
    "others.",
)
@shard_options
@click.option(
    "--latents-output",
    type=PATH,
    help="File to write the final latents to, .npy [N,C,H,W], or [N,C,F,H,W] of videos.",
)
@click.option(
    "--trajectory-output",
    type=PATH,
    help="File to write the latents after every step to, .npy [T,N,C,H,W].",
)
@click.option(
    "--report",
    type=PATH,
    help="JSON file to write a report to: time and kind of every step, cache bytes, versions.",
)
@backend_option
@device_option
@history_option
@click.option(
    "--offload",
    type=click.Choice(OFFLOADS),
    default=DEFAULTS.offload,
    help="What leaves the memory when it has no work: text, the text encoders after prompts are "
    "encoded, or none.",
)
@click.option(
    "--cuda-graphs/--no-cuda-graphs",
    default=DEFAULTS.cuda_graphs,
    help="Record CUDA graphs the second time that a step runs. Turn it off for debugging.",
)
@click.option(
    "--batch-size",
    type=int,
    help="Number of images per batch.  [default: the --max-batch of the export]",
)
@threads_option
@common_options
def command(engine_dir: Path, **options: Any) -> None:
    """Generate images from an engine directory.

    Without an output, the images become a picture with a dated name in the current folder, and
    videos an animation. The path of each file that was written is printed.
    """
    from goc_deploy.api.run import run
    from goc_deploy.cli.paths import check_outputs

    shards = take_shard_options(options)
    chosen = check_outputs(engine_dir, RunOptions(**options))
    if shards is not None:
        _run_sharded(engine_dir, chosen, shards)
        return
    with progress_bar() as progress:
        result = run(engine_dir, chosen, progress)
    for line in _summary(result):
        click.echo(line, err=True)
    for path in result.paths:
        click.echo(path)


def _run_sharded(engine_dir: Path, options: RunOptions, shards: ShardOptions) -> None:
    from goc_deploy.sharded.run import check_sharded, run_sharded

    check_sharded(options)
    with progress_bar() as progress:
        result = run_sharded(engine_dir, options, shards, progress)
    for line in summary(result):
        click.echo(line, err=True)
    click.echo(result.output)


def _summary(result: RunResult) -> Iterator[str]:
    """What came of a run, as lines for stderr."""
    if result.channels is not None:
        yield (
            f"the model makes {result.channels}-channel latents, which need a VAE to become "
            "images; export with --vae, or use --latents-output"
        )
    if result.latents_instead:
        yield f"wrote the latents to {result.latents_instead} instead of images"
    report = result.report
    if report is None:
        yield f"all {result.images} images are there"
        return
    slower = "; -v tells why no faster backend" if report["passed_over"] else ""
    yield (
        f"{report['images']} images with plan {report['plan']} on {report['backend']} "
        f"{report['version']} ({report['provider']}{slower}), {report['computed_units']} of "
        f"{report['all_units']} units computed, {report['total_ms'] / 1e3:.2f} s"
    )


main = partial(run_command, command)  # entry point of goc-run

if __name__ == "__main__":
    raise SystemExit(main())
