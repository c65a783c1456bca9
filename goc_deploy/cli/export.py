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
    Size,
    cfg_scale_option,
    common_options,
    steps_option,
    whole_numbers,
)
from goc_deploy.cli.progress import progress_bar
from goc_deploy.options import SEGMENTS, ExportOptions
from goc_deploy.policies.help import calibrated, grammar
from goc_deploy.policies.registration import installed_policies
from goc_deploy.precision import WEIGHT_FORMATS
from goc_deploy.samplers import SAMPLER_GRAMMAR
from goc_deploy.spec import MAX_REFERENCES, PREDICTION_TYPES

if TYPE_CHECKING:
    from goc_deploy.engine_dir.manifest import Manifest

DEFAULTS = ExportOptions()


@click.command(
    "goc-export",
    context_settings=SETTINGS,
    epilog="Example: goc-export model.pt -o engine --plan none --plan fora:2+gc:1.2",
)
@click.argument("checkpoint", type=PATH)
@click.option("-o", "--output", type=PATH, required=True, help="Engine directory to write.")
@click.option(
    "--model",
    type=click.Choice(
        [
            *("auto", "dit", "pixart", "pixart-sigma", "sd3", "sit", "wan"),
            *("flux", "flux2", "qwen-image", "qwen-image-edit", "z-image"),
        ]
    ),
    default=DEFAULTS.model,
    help="Architecture of the model; auto recognises all but sit, and qwen-image-edit only in "
    "the folder of its pipeline.",
)
@click.option(
    "--num-heads",
    type=click.IntRange(1),
    help="Number of attention heads. Inferred for widths 384, 768, 1024 and 1152; required "
    "otherwise.",
)
@click.option(
    "--precision",
    "--dtype",
    "precision",
    type=Precision(),
    default=DEFAULTS.precision,
    help="Precision of weights, tokens and cache. float32, float16 and bfloat16 are accepted as "
    "other names.",
)
@click.option(
    "--quantize",
    type=click.Choice(WEIGHT_FORMATS),
    multiple=True,
    help="Format of the blocks, repeatable with --max-error. w8 and w4 store weights in 8 or 4 "
    "bits with a scale per 32 values. w8+dynamic is w8 that lets ONNX Runtime round activations, "
    "for speed on CPUs. int8 computes the matrix products with ranges that are seen as the plans "
    "of the export run. int8+smooth moves range from activations to weights first. fp8 is int8 "
    "with float8e4m3fn, for GPUs.  [default: the precision]",
)
@click.option(
    "--quantize-exclude",
    multiple=True,
    metavar="PATTERN",
    help="Units whose weights are not quantised, repeatable: first, last, first:N, last:N blocks, "
    "or a name such as block_03, block_03_mlp or *_attn; none excludes nothing.  "
    "[default: nothing; with int8, int8+smooth and fp8 first:3 and last:3 of wan, first:2 and "
    "last:2 of qwen-image]",
)
@click.option(
    "--max-error",
    type=click.FloatRange(0, min_open=True),
    metavar="BOUND",
    help="Largest relative L2 of the final latents of every plan to no cache in the precision, on "
    "the calibration images. Units are measured one by one in each format, and get the smallest "
    "formats that fit.  [default: all units are quantised]",
)
@click.option(
    "--max-batch",
    type=click.IntRange(1, 1024),
    default=DEFAULTS.max_batch,
    help="Largest number of images per batch.",
)
@steps_option(DEFAULTS.steps, "Number of sampling steps of the plans.")
@click.option(
    "--sampler",
    help=f"Sampler of the plans: {SAMPLER_GRAMMAR}.  [default: diffusers if the model's folder has "
    "a scheduler, otherwise ddim, or euler for flow models]",
)
@click.option(
    "--prediction",
    type=click.Choice(PREDICTION_TYPES),
    help="What the model predicts: the noise, a velocity, the clean sample, or the velocity of a "
    "flow.  [default: that of the model's folder, otherwise eps, or flow for sit]",
)
@click.option(
    "--plan",
    "plans",
    multiple=True,
    metavar="SPEC",
    help=f"Caching policy of a plan, repeatable: {grammar()}{installed_policies()}.  "
    "[default: none and fora:2+goc]",
)
@click.option(
    "--calibrate",
    type=click.IntRange(1),
    metavar="K",
    help=f"Number of images that calibrated policies ({calibrated()}) learn from.  "
    "[default: 16, of a head 512, fewer for large models]",
)
@click.option(
    "--seed",
    "calibration_seed",
    type=int,
    default=DEFAULTS.calibration_seed,
    show_default=False,
    help="Seed of the calibration images.  [default: 2**32, far from the seeds that people use]",
)
@cfg_scale_option("Guidance scale of the calibration images.")
@click.option(
    "--segments",
    type=click.Choice(SEGMENTS),
    default=DEFAULTS.segments,
    help="Part of a step that TensorRT runs as one engine: full is a full step, none is a unit.",
)
@click.option(
    "--weights",
    type=click.Choice(["auto", "ema", "model"]),
    default=DEFAULTS.weights,
    help="Weights of a training checkpoint that are exported; auto takes ema if there are such.",
)
@click.option(
    "--captions",
    type=PATH,
    help="Captions that a text-conditional model uses instead of class labels in calibration, "
    "goc-bench and goc-eval: embeddings (.npz, .safetensors), or prompts (.txt, one per line).  "
    "[default: 16 built-in prompts, if there is a text encoder]",
)
@click.option(
    "--text-encoder",
    type=PATH,
    help="Folder of a T5 encoder and its tokenizer (transformers) that encodes prompts, or of a "
    "pipeline with several text encoders (diffusers).",
)
@click.option(
    "--vae",
    type=PATH,
    help="Folder of an AutoencoderKL (diffusers) that decodes latents to images.",
)
@click.option(
    "--vae-tile",
    type=click.IntRange(4, 512),
    default=DEFAULTS.vae_tile,
    help="Tile size of the decoder. Latents with more pixels per side are decoded in such tiles.",
)
@click.option(
    "--size",
    type=Size(),
    help="Usual width and height in pixels (of the latents, if there is no --vae). With this or "
    "--max-size, images of any size up to the largest can be drawn.  [default: the size that the "
    "model was trained for]",
)
@click.option(
    "--max-size",
    type=Size(),
    help="Largest width and height. An image may be wider or higher if it has no more pixels.  "
    "[default: --size]",
)
@click.option(
    "--frames", type=click.IntRange(1), help="Usual number of frames of a video.  [default: 81]"
)
@click.option(
    "--max-frames", type=click.IntRange(1), help="Largest number of frames.  [default: --frames]"
)
@click.option(
    "--caption-tokens",
    type=click.IntRange(1),
    help="Tokens that every caption has. Longer prompts are cut and shorter ones padded. A smaller "
    "number is faster.  [default: what the model was trained for]",
)
@click.option(
    "--max-references",
    type=click.IntRange(1, MAX_REFERENCES),
    help="Largest number of reference images of a request to a model that edits images.  "
    "[default: 1]",
)
@click.option(
    "--skip-guidance-layers",
    callback=whole_numbers,
    metavar="LAYERS",
    help="Blocks that skip-layer guidance can leave out, separated by commas, such as 7,8,9 of "
    "Stable Diffusion 3.5 Medium. Every image then takes memory for three rows instead of two.  "
    "[default: engines without skip-layer guidance]",
)
@click.option(
    "--lora",
    "loras",
    multiple=True,
    metavar="FILE[:SCALE]",
    help="LoRA to merge into the weights, repeatable: a file or folder of diffusers, PEFT or "
    "kohya's sd-scripts, and the scale of its change, 1 if there is none.",
)
@click.option(
    "--reuse-engines",
    type=PATH,
    metavar="DIR",
    help="Copy the TensorRT engines with shared weights of an engine directory that has the same "
    "graphs and other weights, so that none has to be built.",
)
@click.option("--force", is_flag=True, help="Replace an existing engine directory.")
@engine_options
@common_options
def command(checkpoint: Path, output: Path, **options: Any) -> None:
    """Compile a CHECKPOINT into an engine directory.

    CHECKPOINT is a .pt, .pth or .safetensors file, a folder of diffusers, or its Hub id org/name.
    """
    from goc_deploy.api.exporting import export_with

    engines = engines_from_flags(options)
    engines.check(options["precision"])
    with progress_bar() as progress:
        manifest, written = export_with(checkpoint, output, ExportOptions(**options), progress)
    click.echo(_summary(output, manifest) if written else f"{output} is up to date", err=True)
    engines.build(output)


def _summary(output: Path, manifest: Manifest) -> str:
    spec, size = manifest.model, sum(file.size for file in manifest.files)
    errors = [unit.relative_l2 for unit in manifest.graphs if unit.relative_l2 is not None]
    return (
        f"{output}: {spec.depth} blocks of width {spec.hidden} with {spec.heads} heads, "
        f"{manifest.precision}, {size / 1e6:.1f} MB; "
        f"largest difference of a unit to PyTorch {max(errors):.1e} (relative L2); "
        f"plans {', '.join(plan.name for plan in manifest.plans)}"
        + "".join(f"; LoRA {lora.file} at scale {lora.scale:g}" for lora in manifest.loras)
        + (f"; {len(manifest.engines)} TensorRT engines" if manifest.engines else "")
    )


main = partial(run_command, command)  # entry point of goc-export

if __name__ == "__main__":
    raise SystemExit(main())
