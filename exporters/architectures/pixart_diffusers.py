"""A PixArt that diffusers saved: its configuration, and its tensors in the public layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from goc_deploy.errors import ModelError
from goc_deploy.exporters.architectures.dit_diffusers import position_table
from goc_deploy.exporters.folders import (
    OLD_CLASS,
    TRANSFORMER_REQUIRED,
    Renaming,
    Setting,
    Settings,
    TransformerConfig,
    predicts_sigma,
    transformer_width,
)
from goc_deploy.modulation import SHIFT_AND_SCALE
from goc_deploy.spec import ModelSpec


class PixArtConfig(TransformerConfig, frozen=True, kw_only=True):
    """The settings of a PixArtTransformer2DModel that are read."""

    sample_size: Setting = 128
    out_channels: int | None = 8
    caption_channels: Setting
    cross_attention_dim: int | None = None
    interpolation_scale: float | None = None
    use_additional_conditions: bool | None = None


SETTINGS = Settings(
    PixArtConfig,
    required={
        "_class_name": ("PixArtTransformer2DModel", OLD_CLASS),
        "norm_type": ("ada_norm_single",),
        **TRANSFORMER_REQUIRED,
        "norm_eps": (1e-6,),
    },
)
# Models with latents of this side get the size of the image as an input, unless the file differs.
SIDE_THAT_IS_TOLD = 128
BRANCHES = ("attn", "cross", "mlp")
ROWS_OF_BRANCHES = (SHIFT_AND_SCALE, (), SHIFT_AND_SCALE)
# Pixels per latent pixel of the VAE that PixArt was trained with; the size is given in pixels.
PIXELS_PER_LATENT = 8
TOKENS = 120  # tokens of a caption in the pipeline of diffusers
SIGMA, SIGMA_TOKENS = "pixart-sigma", 300  # the relative, and the tokens in its pipeline
BASE_SIDE = 64  # position tables are stretched for larger latents


def spec_from_config(config: Mapping[str, Any], where: str) -> ModelSpec:
    """The sizes of the model that a ``config.json`` describes.

    Raises:
        ModelError: a setting is unknown, not supported or out of range; the message names it.
    """
    settings = SETTINGS.read(config, where)
    channels, side = settings.in_channels, settings.sample_size
    parts = "4 for positions (a sine and a cosine per axis)"
    sizes = "3 for sizes (height, width, aspect ratio)"
    hidden = transformer_width(settings, 12, f"{parts} times {sizes}", where)
    for name, only in (("cross_attention_dim", hidden), ("interpolation_scale", stretch(side))):
        value = getattr(settings, name)
        if value not in (None, only):
            relative = f"; choose `model={SIGMA}`" if value == side / BASE_SIDE else ""
            raise ModelError(
                f"{where}: {name} is {value:g}, only {only} is supported for a width of {hidden} "
                f"and sample_size {side}{relative}"
            )
    told = settings.use_additional_conditions
    told = side == SIDE_THAT_IS_TOLD if told is None else told
    return ModelSpec(
        depth=settings.num_layers,
        hidden=hidden,
        heads=settings.num_attention_heads,
        mlp_hidden=4 * hidden,
        patch=settings.patch_size,
        grid=side // settings.patch_size,
        channels=channels,
        choices=0,
        learn_sigma=predicts_sigma(settings, where),
        architecture="pixart",
        branches=BRANCHES,
        rows=ROWS_OF_BRANCHES,
        guided_channels=channels,
        caption_channels=settings.caption_channels,
        caption_tokens=TOKENS,
        told_size=side * PIXELS_PER_LATENT if told else 0,
    )


def stretch(side: int) -> int:
    """The number of tokens per unit of distance for latents of a side; for a side of 64 it is 1."""
    return max(side // BASE_SIDE, 1)


def state_from_diffusers(
    tensors: Mapping[str, Tensor], spec: ModelSpec, where: Path
) -> tuple[ModelSpec, dict[str, Tensor]]:
    """The tensors of a PixArtTransformer2DModel under the names of the public layout.

    Returns:
        The spec, unchanged, and the tensors by name.

    Raises:
        ModelError: tensors are missing or left over; the message lists them.
    """
    return spec, state_with_positions(tensors, spec, where, stretch(spec.side))


def state_with_positions(
    tensors: Mapping[str, Tensor], spec: ModelSpec, where: Path, tokens_per_distance: float
) -> dict[str, Tensor]:
    """The tensors of a PixArtTransformer2DModel, with a position table that is computed.

    q, k and v are joined, and so are k and v of the cross-attention.

    Args:
        tensors: those that diffusers saved.
        spec: the model.
        where: the folder, for messages.
        tokens_per_distance: number of tokens within a distance of 1 of the position table.

    Raises:
        ModelError: tensors are missing or left over; the message lists them.
    """
    names = Renaming(tensors, where)
    names.rest.pop("pos_embed.pos_embed", None)
    state = {"pos_embed": position_table(spec, tokens_per_distance)}
    state |= names.take_layers(layer_names(spec))
    tables = {
        f"blocks.{b}.scale_shift_table": f"transformer_blocks.{b}.scale_shift_table"
        for b in range(spec.depth)
    }
    state |= names.take_tensors({**tables, "final_layer.scale_shift_table": "scale_shift_table"})
    for layer, parts in joined_layers(spec).items():
        state |= names.take_joined(layer, parts)
    names.finish()
    return state


def joined_layers(spec: ModelSpec) -> dict[str, tuple[str, ...]]:
    """Layers that join several of diffusers: name in the public layout -> names in diffusers."""
    joined = {}
    for i in range(spec.depth):
        there = f"transformer_blocks.{i}"
        joined[f"blocks.{i}.attn.qkv"] = tuple(f"{there}.attn1.to_{part}" for part in "qkv")
        joined[f"blocks.{i}.cross_attn.kv_linear"] = tuple(
            f"{there}.attn2.to_{part}" for part in "kv"
        )
    return joined


def layers_in_diffusers(spec: ModelSpec) -> dict[str, tuple[str, ...]]:
    """Layers in the public layout -> the layers in diffusers that each one joins."""
    return {new: (old,) for new, old in layer_names(spec).items()} | joined_layers(spec)


def layer_names(spec: ModelSpec) -> dict[str, str]:
    """Layers that differ in name only: name in the public layout -> name in diffusers."""
    embedders = {"t_embedder": "timestep_embedder"}
    if spec.told_size:
        embedders |= {
            "csize_embedder": "resolution_embedder",
            "ar_embedder": "aspect_ratio_embedder",
        }
    names = {
        "x_embedder.proj": "pos_embed.proj",
        "t_block.1": "adaln_single.linear",
        "final_layer.linear": "proj_out",
    }
    for i in (1, 2):
        names[f"y_embedder.y_proj.fc{i}"] = f"caption_projection.linear_{i}"
        names |= {
            f"{new}.mlp.{2 * i - 2}": f"adaln_single.emb.{old}.linear_{i}"
            for new, old in embedders.items()
        }
    for i in range(spec.depth):
        block, there = f"blocks.{i}", f"transformer_blocks.{i}"
        names[f"{block}.attn.proj"] = f"{there}.attn1.to_out.0"
        names[f"{block}.cross_attn.q_linear"] = f"{there}.attn2.to_q"
        names[f"{block}.cross_attn.proj"] = f"{there}.attn2.to_out.0"
        names[f"{block}.mlp.fc1"] = f"{there}.ff.net.0.proj"
        names[f"{block}.mlp.fc2"] = f"{there}.ff.net.2"
    return names
