"""goc-export."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from goc_deploy.cli.app import run_command
from goc_deploy.cli.engine_options import engine_options, engines_from_flags
from goc_deploy.cli.options import (
    PATH,
    SETTINGS,
    Precision,
    cfg_scale_option,
    debug_option,
    steps_option,
    verbose_option,
    version_option,
)
from goc_deploy.cli.progress import progress_bar
from goc_deploy.compiler.plan import SEGMENTS
from goc_deploy.options import ExportOptions
from goc_deploy.policies.grammar import GRAMMAR
from goc_deploy.policies.registration import installed_policies
from goc_deploy.samplers import SAMPLER_GRAMMAR
from goc_deploy.spec import PREDICTIONS

if TYPE_CHECKING:
    from goc_deploy.engine_dir.manifest import Manifest

DEFAULTS = ExportOptions()


@click.command(
    "goc-export",
    context_settings=SETTINGS,
    epilog="Example: goc-export model.pt -o engine --plan none --plan fora:2+gc:1.2",
)
@click.argument("checkpoint", type=PATH)
@click.option("-o", "--output", type=PATH, required=True, help="Engine directory to make.")
@click.option(
    "--model",
    type=click.Choice(["auto", "dit", "pixart", "sit"]),
    default=DEFAULTS.model,
    help="Architecture.",
)
@click.option(
    "--num-heads",
    type=click.IntRange(1),
    help="Attention heads, where the width does not tell (384, 768, 1024, 1152 do).",
)
@click.option(
    "--precision",
    "--dtype",
    "precision",
    type=Precision(),
    default=DEFAULTS.precision,
    help="Precision of weights, tokens and cache. float32, float16 and bfloat16 are other names of the three.",
)
@click.option(
    "--max-batch",
    type=click.IntRange(1, 1024),
    default=DEFAULTS.max_batch,
    help="Most images per run.",
)
@steps_option(DEFAULTS.steps, "Sampling steps of the plans.")
@click.option(
    "--sampler",
    help=f"{SAMPLER_GRAMMAR}.  [default: diffusers where the folder has a scheduler, else ddim, or euler for flow models]",
)
@click.option(
    "--prediction",
    type=click.Choice(PREDICTIONS),
    help="What the model predicts: the noise, velocity, the clean sample, or the velocity of a flow.  "
    "[default: what the folder says, else eps; flow for sit]",
)
@click.option(
    "--plan",
    "plans",
    multiple=True,
    metavar="SPEC",
    help=f"Caching policy, repeatable: {GRAMMAR}{installed_policies()}.  [default: none and fora:2+goc]",
)
@click.option(
    "--calibrate",
    type=click.IntRange(1),
    metavar="K",
    help="Images that calibrated policies (goc, fit, smoothcache, search) learn from.  [default: 16, fewer for large models]",
)
@click.option(
    "--seed",
    "calibration_seed",
    type=int,
    default=DEFAULTS.calibration_seed,
    help="Seed of these images.",
)
@cfg_scale_option(DEFAULTS.cfg_scale, "Guidance scale of these images.")
@click.option(
    "--segments",
    type=click.Choice(SEGMENTS),
    default=DEFAULTS.segments,
    help="What TensorRT runs as one engine: a full step, or no more than a unit.",
)
@click.option(
    "--weights",
    type=click.Choice(["auto", "ema", "model"]),
    default=DEFAULTS.weights,
    help="Which weights of a training checkpoint.",
)
@click.option(
    "--captions",
    type=PATH,
    help="What a model of captions calibrates, benches and evaluates with, in place of labels: embeddings (.npz, .safetensors), "
    "or prompts (.txt, one per line).  [default: 16 prompts of its own, with a text encoder]",
)
@click.option(
    "--text-encoder",
    type=PATH,
    help="Folder of a T5 encoder and its tokenizer (transformers), to draw prompts with.",
)
@click.option(
    "--vae", type=PATH, help="Folder of an AutoencoderKL (diffusers), to decode latents with."
)
@click.option(
    "--vae-tile",
    type=click.IntRange(8, 512),
    default=DEFAULTS.vae_tile,
    help="Latents of more pixels per side are decoded in tiles of this size.",
)
@click.option("--allow-nonfinite", is_flag=True, help="Accept NaN and infinite weights.")
@click.option("--force", is_flag=True, help="Replace an existing engine directory.")
@engine_options
@verbose_option
@debug_option
@version_option
def command(checkpoint: Path, output: Path, **options: Any) -> None:
    """Compile a CHECKPOINT (.pt, .pth, .safetensors, a folder of diffusers, or its Hub id org/name) into an engine directory."""
    from goc_deploy.api.exporting import export_with

    engines = engines_from_flags(options)
    engines.check(options["precision"])
    with progress_bar() as progress:
        manifest, written = export_with(checkpoint, output, ExportOptions(**options), progress)
    click.echo(_summary(output, manifest) if written else f"{output} is up to date", err=True)
    engines.build(output)


def _summary(output: Path, manifest: Manifest) -> str:
    spec, errors = (
        manifest.model,
        [unit.relative_l2 for unit in manifest.units if unit.relative_l2 is not None],
    )
    size = sum(file.size for file in manifest.files)
    return (
        f"{output}: {spec.depth} blocks of width {spec.hidden} with {spec.heads} heads, {manifest.precision}, {size / 1e6:.1f} MB; "
        f"largest difference of a unit to PyTorch {max(errors):.1e} (relative L2); plans {', '.join(plan.name for plan in manifest.plans)}"
    )


main = partial(run_command, command)  # entry point of goc-export
