"""A FLUX.1 that diffusers saved: its configuration, and the names and shapes of its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct
from torch import Tensor

from goc_deploy.blocks import IMAGE_FEATURE, MAX_BLOCKS, STREAMS, TEXT_FEATURE, Blocks, Unit
from goc_deploy.errors import ModelError
from goc_deploy.exporters.architectures.dit_model import TIMESTEP_FREQUENCIES
from goc_deploy.exporters.folders import MAX_WIDTH, Setting, Settings
from goc_deploy.exporters.tracing import check_shapes
from goc_deploy.spec import ModelSpec, Positions

PATCH, PIXELS_PER_LATENT = 2, 8
VALUES_OF_PATCH = PATCH**2
GRID = (64, 64)  # tokens of an image of 1024 x 1024 pixels
MLP_RATIO = 4
TOKENS, TOKENS_WITHOUT_GUIDANCE = 512, 256  # of a caption: of FLUX.1-dev, and of FLUX.1-schnell
AXES = (16, 56, 56)  # values of a head that an image's index, row and column turn
SHIFTS = ("shift", "scale", "shift_text", "scale_text")
BOTH = (IMAGE_FEATURE, TEXT_FEATURE)
DOUBLE = (Unit("attn", SHIFTS, BOTH, STREAMS), Unit("mlp", SHIFTS, BOTH, STREAMS))
SINGLE = (Unit("single", features=BOTH, reads=STREAMS),)
LAST = (Unit("single", reads=STREAMS),)  # nothing reads the text after it
EMBEDDER = "time_text_embed"


class Sizes(Struct, frozen=True, kw_only=True):
    """The sizes that the settings of FLUX.1 and FLUX.2 have in common."""

    in_channels: Setting
    num_layers: Setting
    num_single_layers: Setting
    attention_head_dim: Setting
    num_attention_heads: Setting
    axes_dims_rope: tuple[Setting, ...]


class FluxConfig(Sizes, frozen=True, kw_only=True):
    """The settings of a FluxTransformer2DModel that are read."""

    in_channels: Setting = 64
    out_channels: int | None = None
    num_layers: Setting = 19
    num_single_layers: Setting = 38
    attention_head_dim: Setting = 128
    num_attention_heads: Setting = 24
    joint_attention_dim: Setting = 4096
    pooled_projection_dim: Setting = 768
    guidance_embeds: bool = False
    axes_dims_rope: tuple[Setting, Setting, Setting] = AXES


SETTINGS = Settings(
    FluxConfig, required={"_class_name": ("FluxTransformer2DModel",), "patch_size": (1,)}
)


def spec_from_config(config: Mapping[str, Any], where: str) -> ModelSpec:
    """The sizes of the model that a ``config.json`` describes.

    Raises:
        ModelError: a setting is unknown, not supported or out of range; the message names it.
    """
    settings = SETTINGS.read(config, where)
    if settings.out_channels not in (None, settings.in_channels):
        raise ModelError(
            f"{where}: in_channels is {settings.in_channels} and out_channels "
            f"{settings.out_channels}; models that start from a picture are not supported"
        )
    check_sizes(settings, where)
    return spec_of(settings)


def check_sizes(settings: Sizes, where: str) -> None:
    """Check the sizes of a FLUX.1 or FLUX.2.

    Raises:
        ModelError: sizes do not fit together or are too large; the message names them.
    """
    heads, head, axes = (
        settings.num_attention_heads,
        settings.attention_head_dim,
        settings.axes_dims_rope,
    )
    if settings.in_channels % VALUES_OF_PATCH:
        raise ModelError(
            f"{where}: in_channels is {settings.in_channels}, expected a multiple of "
            f"{VALUES_OF_PATCH}, the pixels of a patch"
        )
    if sum(axes) != head or any(width % 2 for width in axes) or heads * head > MAX_WIDTH:
        raise ModelError(
            f"{where}: axes_dims_rope is {list(axes)}, attention_head_dim {head} and "
            f"num_attention_heads {heads}; the first must be even numbers whose sum is the second, "
            f"and all heads together at most {MAX_WIDTH} wide"
        )
    if settings.num_layers + settings.num_single_layers > MAX_BLOCKS:
        raise ModelError(
            f"{where}: num_layers is {settings.num_layers} and num_single_layers "
            f"{settings.num_single_layers}, at most {MAX_BLOCKS} in all are supported"
        )


def spec_of(settings: FluxConfig) -> ModelSpec:
    """The model of these sizes, for images of 1024 x 1024 pixels."""
    channels = settings.in_channels // VALUES_OF_PATCH
    hidden = settings.num_attention_heads * settings.attention_head_dim
    runs = (
        (settings.num_layers, DOUBLE),
        (settings.num_single_layers - 1, SINGLE),
        (1, LAST),
    )
    return ModelSpec(
        depth=settings.num_layers + settings.num_single_layers,
        hidden=hidden,
        heads=settings.num_attention_heads,
        mlp_hidden=MLP_RATIO * hidden,
        patch=PATCH,
        grid=GRID,
        channels=channels,
        choices=0,
        learn_sigma=False,
        architecture="flux",
        branches=("attn", "mlp", "single"),
        blocks=tuple(Blocks(count, units) for count, units in runs if count),
        prediction_type="flow_to_noise",
        guided_channels=channels,
        caption_channels=settings.joint_attention_dim,
        caption_tokens=TOKENS if settings.guidance_embeds else TOKENS_WITHOUT_GUIDANCE,
        pooled_channels=settings.pooled_projection_dim,
        embedded_guidance=settings.guidance_embeds,
        distilled=True,
        positions=Positions("rotary", widths=settings.axes_dims_rope),
        max_grid=GRID,
        vae_scale=PIXELS_PER_LATENT,
    )


def block_names(spec: ModelSpec) -> tuple[str, ...]:
    """The name of each block in the public layout, in the order of execution."""
    doubles = sum("attn" in branches for branches in spec.branches_of_blocks)
    return (
        *(f"transformer_blocks.{i}" for i in range(doubles)),
        *(f"single_transformer_blocks.{i}" for i in range(spec.depth - doubles)),
    )


def state_from_diffusers(
    tensors: Mapping[str, Tensor], spec: ModelSpec, where: Path
) -> tuple[ModelSpec, dict[str, Tensor]]:
    """The tensors of a FluxTransformer2DModel, whose names are kept; see `check_tensors`."""
    del where
    return spec, dict(tensors)


def check_tensors(tensors: Mapping[str, Tensor], spec: ModelSpec) -> None:
    """Check names and shapes of tensors.

    Raises:
        ModelError: tensors are missing, unexpected or of another shape; the message lists up to ten
            of each.
    """
    check_shapes(tensors, shapes_from_spec(spec), described(spec))


def described(spec: ModelSpec) -> str:
    """The model in words, for messages."""
    guided = "with" if spec.embedded_guidance else "without"
    return f"a FLUX.1 {guided} embedded guidance, of {spec.depth} blocks and width {spec.hidden}"


def shapes_from_spec(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of a model, in the layout of diffusers."""
    width, inner, head = spec.hidden, spec.mlp_hidden, spec.hidden // spec.heads
    values = spec.channels * VALUES_OF_PATCH
    embedders = {
        "timestep_embedder": TIMESTEP_FREQUENCIES,
        "text_embedder": spec.pooled_channels,
        **({"guidance_embedder": TIMESTEP_FREQUENCIES} if spec.embedded_guidance else {}),
    }
    layers = {
        "x_embedder": (width, values),
        "context_embedder": (width, spec.caption_channels),
        "norm_out.linear": (2 * width, width),
        "proj_out": (values, width),
    }
    for name, read in embedders.items():
        layers[f"{EMBEDDER}.{name}.linear_1"] = (width, read)
        layers[f"{EMBEDDER}.{name}.linear_2"] = (width, width)
    norms = []
    for block, branches in zip(block_names(spec), spec.branches_of_blocks, strict=True):
        parts = ["to_q", "to_k", "to_v"]
        norms += [f"{block}.attn.norm_{part}.weight" for part in "qk"]
        if "attn" in branches:
            parts += ["to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
            norms += [f"{block}.attn.norm_added_{part}.weight" for part in "qk"]
            for stream in ("", "_context"):
                layers[f"{block}.norm1{stream}.linear"] = (6 * width, width)
                layers[f"{block}.ff{stream}.net.0.proj"] = (inner, width)
                layers[f"{block}.ff{stream}.net.2"] = (width, inner)
        else:
            layers[f"{block}.norm.linear"] = (3 * width, width)
            layers[f"{block}.proj_mlp"] = (inner, width)
            layers[f"{block}.proj_out"] = (width, width + inner)
        layers |= {f"{block}.attn.{part}": (width, width) for part in parts}
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(norms, (head,))
    for name, shape in layers.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes
