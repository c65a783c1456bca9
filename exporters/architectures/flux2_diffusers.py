"""A FLUX.2 that diffusers saved: its configuration, and the names and shapes of its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from goc_deploy.blocks import Blocks
from goc_deploy.errors import ModelError
from goc_deploy.exporters.architectures.dit_model import TIMESTEP_FREQUENCIES
from goc_deploy.exporters.architectures.flux_diffusers import (
    DOUBLE,
    GRID,
    LAST,
    PATCH,
    PIXELS_PER_LATENT,
    SINGLE,
    TOKENS,
    VALUES_OF_PATCH,
    Sizes,
    block_names,
    check_sizes,
)
from goc_deploy.exporters.architectures.flux_diffusers import (
    state_from_diffusers as state_from_diffusers,
)
from goc_deploy.exporters.architectures.flux_files import block_counts
from goc_deploy.exporters.folders import Setting, Settings
from goc_deploy.exporters.tracing import check_shapes
from goc_deploy.spec import ModelSpec, Positions

MLP_RATIO = 3
AXES = (32, 32, 32, 32)  # values of a head that an image's index, row and column and the text turn
THETA = 2000
# Layers of modulation that blocks share -> rows (shift, scale, gate for each branch):
SHARED = {
    "double_stream_modulation_img": 6,
    "double_stream_modulation_txt": 6,
    "single_stream_modulation": 3,
}


class Flux2Config(Sizes, frozen=True, kw_only=True):
    """The settings of a Flux2Transformer2DModel that are read."""

    in_channels: Setting = 128
    out_channels: int | None = None
    num_layers: Setting = 8
    num_single_layers: Setting = 48
    attention_head_dim: Setting = 128
    num_attention_heads: Setting = 48
    joint_attention_dim: Setting = 15360
    guidance_embeds: bool = True
    axes_dims_rope: tuple[Setting, Setting, Setting, Setting] = AXES
    rope_theta: Setting = THETA


SETTINGS = Settings(
    Flux2Config,
    required={
        "_class_name": ("Flux2Transformer2DModel",),
        "patch_size": (1,),
        "timestep_guidance_channels": (TIMESTEP_FREQUENCIES,),
        "mlp_ratio": (3.0,),
        "eps": (1e-6,),
    },
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
            f"{settings.out_channels}, only equal numbers are supported"
        )
    check_sizes(settings, where)
    return spec_of(settings)


def spec_from_tensors(tensors: Mapping[str, Tensor], heads: int | None) -> ModelSpec:
    """Infer the sizes of a model from its tensors, in the layout of diffusers.

    Raises:
        ModelError: the sizes cannot be read, or the heads are not those of the public models.
    """
    try:
        hidden, values = tensors["x_embedder.weight"].shape
        head = tensors["single_transformer_blocks.0.attn.norm_q.weight"].shape[0]
        text = tensors["context_embedder.weight"].shape[1]
    except (KeyError, ValueError, IndexError) as cause:
        raise ModelError(
            f"the checkpoint looks like a FLUX.2 but its sizes cannot be read: {cause}"
        ) from cause
    if head != sum(AXES) or hidden % head or heads not in (None, hidden // head):
        raise ModelError(
            f"the width is {hidden}, with heads of {head}; heads of {sum(AXES)} are supported in a "
            "file, because it does not have their axes_dims_rope: leave out `num_heads`, or give "
            "the folder that diffusers saved"
        )
    doubles, singles = block_counts(tensors)
    return spec_of(
        Flux2Config(
            in_channels=values,
            num_layers=doubles,
            num_single_layers=singles,
            num_attention_heads=hidden // head,
            joint_attention_dim=text,
            guidance_embeds="time_guidance_embed.guidance_embedder.linear_1.weight" in tensors,
        )
    )


def spec_of(settings: Flux2Config) -> ModelSpec:
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
        architecture="flux2",
        branches=("attn", "mlp", "single"),
        blocks=tuple(Blocks(count, units) for count, units in runs if count),
        prediction_type="flow_to_noise",
        guided_channels=channels,
        caption_channels=settings.joint_attention_dim,
        caption_tokens=TOKENS,
        embedded_guidance=settings.guidance_embeds,
        positions=Positions(
            "rotary",
            widths=settings.axes_dims_rope,
            theta=float(settings.rope_theta),
            turns_text=True,
            text_axis=True,
        ),
        max_grid=GRID,
        vae_scale=PIXELS_PER_LATENT,
    )


def check_tensors(tensors: Mapping[str, Tensor], spec: ModelSpec) -> None:
    """Check names and shapes of tensors.

    Raises:
        ModelError: tensors are missing, unexpected or of another shape; the message lists up to ten
            of each.
    """
    what = f"a FLUX.2 of {spec.depth} blocks and width {spec.hidden}"
    check_shapes(tensors, shapes_from_spec(spec), what)


def shapes_from_spec(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of a model, in the layout of diffusers."""
    width, inner, head = spec.hidden, spec.mlp_hidden, spec.hidden // spec.heads
    values = spec.channels * VALUES_OF_PATCH
    layers = {
        "x_embedder": (width, values),
        "context_embedder": (width, spec.caption_channels),
        "norm_out.linear": (2 * width, width),
        "proj_out": (values, width),
        **{f"{layer}.linear": (rows * width, width) for layer, rows in SHARED.items()},
    }
    for name in ["timestep_embedder"] + ["guidance_embedder"] * spec.embedded_guidance:
        layers[f"time_guidance_embed.{name}.linear_1"] = (width, TIMESTEP_FREQUENCIES)
        layers[f"time_guidance_embed.{name}.linear_2"] = (width, width)
    norms: dict[str, tuple[int, ...]] = {}
    for block, branches in zip(block_names(spec), spec.branches_of_blocks, strict=True):
        attn = f"{block}.attn"
        norms |= dict.fromkeys((f"{attn}.norm_q.weight", f"{attn}.norm_k.weight"), (head,))
        if "attn" in branches:
            norms |= dict.fromkeys([f"{attn}.norm_added_{part}.weight" for part in "qk"], (head,))
            parts = ("to_q", "to_k", "to_v", "to_out.0", "to_add_out")
            added = [f"add_{part}_proj" for part in "qkv"]
            layers |= dict.fromkeys([f"{attn}.{part}" for part in (*parts, *added)], (width, width))
            for stream in ("ff", "ff_context"):
                layers[f"{block}.{stream}.linear_in"] = (2 * inner, width)
                layers[f"{block}.{stream}.linear_out"] = (width, inner)
        else:
            layers[f"{attn}.to_qkv_mlp_proj"] = (3 * width + 2 * inner, width)
            layers[f"{attn}.to_out"] = (width, width + inner)
    return {**norms, **{f"{name}.weight": shape for name, shape in layers.items()}}
