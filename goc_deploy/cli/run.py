"""goc-run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
    threads_option,
    verbose_option,
    version_option,
)
from goc_deploy.cli.progress import progress_bar
from goc_deploy.options import GenerateOptions

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
    help="Name or SPEC of a plan.  [default: the first plan that caches]",
)
@click.option(
    "--labels",
    help="Class labels, one per image: numbers, or class names of the model's folder; which captions, for a model of captions.  "
    "[default: 0,1,2,... over the classes]",
)
@click.option(
    "--prompt", "prompts", multiple=True, help="A text to draw, repeatable, where the engine has a text encoder."
)
@click.option(
    "--negative-prompt", "negatives", multiple=True, help="What to draw away from: once, or once per --prompt."
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
@click.option("--seed", type=int, default=DEFAULTS.seed, help="Seed of the noise; image i depends on (seed, i) alone.")
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
    help="Images: .png is a grid, .npz the ADM format, else a directory of PNGs.",
)
@click.option("--latents-output", type=PATH, help="Final latents, .npy [N,C,H,W].")
@click.option("--trajectory-output", type=PATH, help="Latents after every step, .npy [T,N,C,H,W].")
@click.option("--report", type=PATH, help="JSON report: time and kind of every step, cache bytes, versions.")
@backend_option
@device_option
@click.option(
    "--cuda-graphs/--no-cuda-graphs",
    default=True,
    help="Record CUDA graphs the second time that a step runs; off, for debugging.",
)
@click.option("--batch-size", type=int, help="Images per run.  [default: what the engine was exported for]")
@threads_option
@verbose_option
@debug_option
@version_option
def command(
    engine_dir: Path,
    plan: str | None,
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
    backend: str,
    device: str,
    batch_size: int | None,
    threads: int,
    cuda_graphs: bool,
    **generate: Any,
) -> None:
    """Generate images from an engine directory."""
    from goc_deploy import outputs
    from goc_deploy.api import load
    from goc_deploy.captions import prompt_embeds_from_arrays
    from goc_deploy.errors import UsageError
    from goc_deploy.labels import labels_from_text
    from goc_deploy.tensor_files import arrays_from_file

    outputs.check_suffix(
        output, "", ".png", ".npz", what="--output ends in .png or .npz, or has no suffix and is a directory"
    )
    outputs.check_writable(output, may_be_folder=True)
    for path in (latents_output, trajectory_output, report):
        outputs.check_writable(path)
    latents = outputs.read_latents(latents_file)
    if bool(prompts) + (embeds_file is not None) > 1 or (negatives and not prompts):
        raise UsageError("give --prompt or --prompt-embeds, not both; --negative-prompt goes with --prompt")
    arrays = None if embeds_file is None else arrays_from_file(embeds_file)
    with (
        load(
            engine_dir,
            backend=backend,
            plan=plan,
            batch_size=batch_size,
            threads=threads,
            cuda_graphs=cuda_graphs,
            device=device,
        ) as pipe,
        progress_bar() as progress,
    ):
        captions = None if arrays is None else prompt_embeds_from_arrays(arrays, pipe.spec, str(embeds_file))
        if prompts:
            captions = pipe.encode(prompts, negatives or ("",))
        rows = None if labels is None else labels_from_text(labels, pipe.manifest.class_names)
        if captions is not None and rows is None:
            rows = tuple(range(len(captions.prompts)))
        count = num_images or (None if latents is None else len(latents))
        chosen = outputs.spread_labels(rows, count, pipe.spec.classes)
        total = len(chosen) * pipe.plan.steps
        result = pipe.generate(
            chosen,
            captions=captions,
            latents=latents,
            trajectory=trajectory_output is not None,
            callback=lambda event: progress(
                f"steps of images {event.first_image + 1}-{event.first_image + event.images}",
                event.first_image * event.steps + (event.step + 1) * event.images,
                total,
            ),
            **generate,
        )
    described = result.report
    click.echo(
        f"{len(chosen)} images with plan {described['plan']} on {described['backend']} {described['version']} ({described['provider']}"
        f"{'; -v tells why no faster backend' if described['passed_over'] else ''}), "
        f"{described['computed_units']} of {described['all_units']} units computed, {described['total_ms'] / 1e3:.2f} s",
        err=True,
    )
    if latents_output:
        outputs.save_array(result.latents, latents_output)
    if result.trajectory is not None and trajectory_output:
        outputs.save_array(result.trajectory, trajectory_output)
    if report:
        outputs.save_text(json.dumps(described, indent=1) + "\n", report)
    if result.images is None:
        click.echo(
            f"the model makes {pipe.spec.channels}-channel latents, which need a VAE to become images; export with --vae, or use --latents-output",
            err=True,
        )
        if output and not latents_output:
            outputs.save_array(result.latents, output.with_suffix(".npy"))
            click.echo(f"wrote the latents to {output.with_suffix('.npy')} instead of images", err=True)
    elif output:
        from goc_deploy.runtime.images import save_images

        save_images(result.images, output, outputs.grid_columns(chosen))
    for path in (output if result.images is not None else None, latents_output, trajectory_output, report):
        if path:
            click.echo(path)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of goc-run."""
    return run_command(command, argv)
