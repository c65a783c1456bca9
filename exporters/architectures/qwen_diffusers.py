"""A Qwen-Image that diffusers saved: its configuration, and the names and shapes of its tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta, Struct
from torch import Tensor

from goc_deploy.blocks import (
    IMAGE_FEATURE,
    MAX_BLOCKS,
    STREAMS,
    TEXT_FEATURE,
    Blocks,
    Unit,
)
from goc_deploy.errors import ModelError
from goc_deploy.exporters.folders import MAX_WIDTH, Setting, Settings
from goc_deploy.exporters.tracing import check_shapes
from goc_deploy.modulation import SHIFT_AND_SCALE
from goc_deploy.spec import ModelSpec, Positions

PATCH, FREQUENCIES, MLP_RATIO = 2, 256, 4
TOKENS = 512  # of a caption, in diffusers' pipeline; a longer one is cut
SIDE = 166  # of the usual latents, for images of 1328x1328 pixels
PIXELS_PER_LATENT = 8  # of the VAE of the public models, which has 16 channels
VAE_CHANNELS = 16
ROWS = (*SHIFT_AND_SCALE, "shift_text", "scale_text")
BOTH = (IMAGE_FEATURE, TEXT_FEATURE)


class QwenConfig(Struct, frozen=True, kw_only=True):
    """The settings of a QwenImageTransformer2DModel that are read, with the defaults of diffusers.

    Attributes:
        num_attention_heads: heads.
        attention_head_dim: width of a head.
        in_channels: values of a token: those of a patch of the latents.
        out_channels: channels of the model output, or None for ``in_channels``.
        joint_attention_dim: width of a caption's embeddings.
        num_layers: blocks.
        axes_dims_rope: values of a head that frames, rows and columns turn.
    """

    num_attention_heads: Setting = 24
    attention_head_dim: Setting = 128
    in_channels: Setting = 64
    out_channels: int | None = 16
    joint_attention_dim: Setting = 3584
    num_layers: Setting = 60
    axes_dims_rope: Annotated[tuple[Setting, ...], Meta(min_length=3, max_length=3)] = (16, 56, 56)


SETTINGS = Settings(
    QwenConfig,
    required={
        "_class_name": ("QwenImageTransformer2DModel",),
        "patch_size": (PATCH,),
        "guidance_embeds": (False,),
        "zero_cond_t": (False,),  # Edit-2511 has another time for the tokens of its references
        "use_additional_t_cond": (False,),  # as Layered
        "use_layer3d_rope": (False,),
    },
)


def spec_from_config(config: Mapping[str, Any], where: str) -> ModelSpec:
    """The sizes of the model that a ``config.json`` describes.

    Raises:
        ModelError: a setting is unknown, not supported or out of range; the message names it.
    """
    settings = SETTINGS.read(config, where)
    heads, head, widths = (
        settings.num_attention_heads,
        settings.attention_head_dim,
        settings.axes_dims_rope,
    )
    channels = (settings.out_channels or settings.in_channels, settings.in_channels // PATCH**2)
    if settings.in_channels % PATCH**2 or channels[0] != channels[1]:
        raise ModelError(
            f"{where}: in_channels is {settings.in_channels} and out_channels "
            f"{settings.out_channels}; only {PATCH**2} times as many channels in as out, the "
            "values of a patch, are supported"
        )
    if sum(widths) != head or any(width % 2 for width in widths) or heads * head > MAX_WIDTH:
        raise ModelError(
            f"{where}: axes_dims_rope is {list(widths)}, attention_head_dim {head} and "
            f"num_attention_heads {heads}; the first must be even and sum up to the second, and "
            f"all heads together be at most {MAX_WIDTH} wide"
        )
    if settings.num_layers > MAX_BLOCKS:
        raise ModelError(
            f"{where}: num_layers is {settings.num_layers}, at most {MAX_BLOCKS} are supported"
        )
    return spec_of(
        settings.num_layers,
        heads,
        widths,
        channels=channels[1],
        text=settings.joint_attention_dim,
    )


def spec_from_tensors(tensors: Mapping[str, Tensor], heads: int | None) -> ModelSpec:
    """Infer the sizes of a model from its tensors.

    Raises:
        ModelError: the sizes cannot be read, or another number of heads was given.
    """
    try:
        hidden, of_patch = tensors["img_in.weight"].shape
        text = tensors["txt_in.weight"].shape[1]
        (head,) = tensors["transformer_blocks.0.attn.norm_q.weight"].shape
        match = re.compile(r"transformer_blocks\.(\d+)\.").match
        depth = 1 + max(int(m[1]) for m in map(match, tensors) if m)
    except (KeyError, ValueError) as cause:
        raise ModelError(
            f"the checkpoint looks like a Qwen-Image but its sizes cannot be read: {cause}"
        ) from cause
    if not head or head % 32 or hidden % head or heads not in (None, hidden // head):
        raise ModelError(
            f"the width {hidden} has heads of {head} values; only multiples of 32 are supported, "
            "and `num_heads` must be their number"
        )
    side = 7 * head // 16  # values of a head for rows, and for columns; the rest is for frames
    return spec_of(
        depth,
        hidden // head,
        (head - 2 * side, side, side),
        channels=of_patch // PATCH**2,
        text=text,
    )


def spec_of(
    depth: int, heads: int, widths: tuple[int, ...], *, channels: int, text: int
) -> ModelSpec:
    """The model of these sizes, for images of 1328x1328 pixels.

    Args:
        depth: number of blocks.
        heads: attention heads.
        widths: values of a head that frames, rows and columns turn.
        channels: channels of the latents.
        text: width of a caption's embeddings.
    """
    hidden, grid = heads * sum(widths), (SIDE // PATCH, SIDE // PATCH)
    both = (Unit("attn", ROWS, BOTH, STREAMS), Unit("mlp", ROWS, BOTH, STREAMS))
    # Nothing reads the text after the last attention.
    last = (Unit("attn", ROWS, (IMAGE_FEATURE,), STREAMS), Unit("mlp"))
    return ModelSpec(
        depth=depth,
        hidden=hidden,
        heads=heads,
        mlp_hidden=MLP_RATIO * hidden,
        patch=PATCH,
        grid=grid,
        channels=channels,
        choices=0,
        learn_sigma=False,
        architecture="qwen-image",
        blocks=(*([Blocks(depth - 1, both)] if depth > 1 else []), Blocks(1, last)),
        prediction_type="flow_to_noise",
        guided_channels=channels,
        guidance_norm="token",
        caption_channels=text,
        caption_tokens=TOKENS,
        positions=Positions("rotary", widths=widths, centered=True, turns_text=True),
        max_grid=grid,
        vae_scale=PIXELS_PER_LATENT if channels == VAE_CHANNELS else 1,
    )


def state_from_diffusers(
    tensors: Mapping[str, Tensor], spec: ModelSpec, where: Path
) -> tuple[ModelSpec, dict[str, Tensor]]:
    """The tensors of a QwenImageTransformer2DModel, under their own names.

    `check_tensors` checks them.
    """
    del where
    return spec, dict(tensors)


def check_tensors(tensors: Mapping[str, Tensor], spec: ModelSpec) -> None:
    """Check names and shapes of tensors.

    Raises:
        ModelError: tensors are missing, unexpected or of another shape; the message lists up to ten
            of each.
    """
    what = f"a Qwen-Image of depth {spec.depth} and width {spec.hidden}"
    check_shapes(tensors, shapes_from_spec(spec), what)


def shapes_from_spec(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of a model; its last block has unused ones for the text."""
    width, inner, text = spec.hidden, spec.mlp_hidden, spec.caption_channels
    of_patch = spec.channels * PATCH**2
    layers = {
        "time_text_embed.timestep_embedder.linear_1": (width, FREQUENCIES),
        "time_text_embed.timestep_embedder.linear_2": (width, width),
        "img_in": (width, of_patch),
        "txt_in": (width, text),
        "norm_out.linear": (2 * width, width),
        "proj_out": (of_patch, width),
    }
    shapes: dict[str, tuple[int, ...]] = {"txt_norm.weight": (text,)}
    for i in range(spec.depth):
        block = f"transformer_blocks.{i}"
        for part in ("q", "k", "v"):
            layers[f"{block}.attn.to_{part}"] = (width, width)
            layers[f"{block}.attn.add_{part}_proj"] = (width, width)
        for part in ("to_out.0", "to_add_out"):
            layers[f"{block}.attn.{part}"] = (width, width)
        for stream in ("img", "txt"):
            layers[f"{block}.{stream}_mod.1"] = (6 * width, width)
            layers[f"{block}.{stream}_mlp.net.0.proj"] = (inner, width)
            layers[f"{block}.{stream}_mlp.net.2"] = (width, inner)
        for norm in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            shapes[f"{block}.attn.{norm}.weight"] = (width // spec.heads,)
    for name, shape in layers.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes
