"""A PixArt as diffusers saves it: its configuration, and its tensors under the names of the public layout."""

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
    TRANSFORMER_SIZES,
    Renaming,
    Settings,
    predicts_sigma,
    transformer_width,
)
from goc_deploy.spec import ModelSpec

SETTINGS = Settings(
    sizes={**TRANSFORMER_SIZES, "sample_size": 128},
    required={
        "_class_name": ("PixArtTransformer2DModel", OLD_CLASS),
        "norm_type": ("ada_norm_single",),
        **TRANSFORMER_REQUIRED,
        "norm_eps": (1e-6,),
    },
    read=(
        "out_channels",
        "cross_attention_dim",
        "caption_channels",
        "interpolation_scale",
        "use_additional_conditions",
    ),
)
SIDE_THAT_IS_TOLD = (
    128  # latents of this side come with the size of the image, where the file does not say
)
BRANCHES = ("attn", "cross", "mlp")
PIXELS_PER_LATENT = (
    8  # of the VAE that it was trained with: what a model that is told the image's size is told
)
TOKENS = 120  # of a caption, in the pipeline that the configuration belongs to
BASE_SIDE = 64  # position tables are stretched for larger latents


def spec_from_config(config: Mapping[str, Any], where: str) -> ModelSpec:
    """Sizes of the model that a ``config.json`` describes.

    Raises:
        ModelError: naming the setting that is unknown, not supported or out of range.
    """
    size = SETTINGS.check(config, where)
    channels, patch, side = size["in_channels"], size["patch_size"], size["sample_size"]
    parts = "4 for positions (a sine and a cosine per axis) times 3 for sizes (height, width, aspect ratio)"
    hidden = transformer_width(size, 12, parts, where)
    learn_sigma = predicts_sigma(config, channels, 8, where)
    if config.get("cross_attention_dim", hidden) != hidden:
        raise ModelError(
            f"{where}: cross_attention_dim is {config['cross_attention_dim']!r}, only {hidden} is supported"
        )
    captions, told = config.get("caption_channels"), config.get("use_additional_conditions")
    if type(captions) is not int or not 1 <= captions <= 10**5:
        raise ModelError(
            f"{where}: caption_channels must be a whole number from 1 on, got {captions!r}"
        )
    if told not in (None, True, False):
        raise ModelError(
            f"{where}: use_additional_conditions must be true, false or null, got {told!r}"
        )
    if config.get("interpolation_scale") not in (None, stretch(side)):
        raise ModelError(
            f"{where}: interpolation_scale is {config['interpolation_scale']!r}, only {stretch(side)} is supported for sample_size {side}"
        )
    told = side == SIDE_THAT_IS_TOLD if told is None else told
    return ModelSpec(
        depth=size["num_layers"],
        hidden=hidden,
        heads=size["num_attention_heads"],
        mlp_hidden=4 * hidden,
        patch=patch,
        grid=side // patch,
        channels=channels,
        classes=0,
        learn_sigma=learn_sigma,
        architecture="pixart",
        branches=BRANCHES,
        guided_channels=channels,
        caption_channels=captions,
        caption_tokens=TOKENS,
        told_size=side * PIXELS_PER_LATENT if told else 0,
    )


def stretch(side: int) -> int:
    """By how much the positions of latents of a side are stretched: those of 64 pixels are 1 apart."""
    return max(side // BASE_SIDE, 1)


def state_from_diffusers(
    found: Mapping[str, Tensor], spec: ModelSpec, where: Path
) -> tuple[ModelSpec, dict[str, Tensor]]:
    """Tensors of a PixArtTransformer2DModel under the names of the public layout.

    q, k and v are joined, k and v of the cross-attention too, and the position table is computed.

    Raises:
        ModelError: listing tensors that are missing or left over.
    """
    names = Renaming(found, where)
    names.rest.pop("pos_embed.pos_embed", None)
    state = {"pos_embed": position_table(spec.hidden, spec.grid, stretch(spec.side))}
    state |= names.take_layers(layer_names(spec))
    tables = {
        f"blocks.{b}.scale_shift_table": f"transformer_blocks.{b}.scale_shift_table"
        for b in range(spec.depth)
    }
    state |= names.take_tensors({**tables, "final_layer.scale_shift_table": "scale_shift_table"})
    for block in range(spec.depth):
        there = f"transformer_blocks.{block}"
        state |= names.take_joined(
            f"blocks.{block}.attn.qkv", [f"{there}.attn1.to_{part}" for part in "qkv"]
        )
        state |= names.take_joined(
            f"blocks.{block}.cross_attn.kv_linear", [f"{there}.attn2.to_{p}" for p in "kv"]
        )
    names.finish()
    return spec, state


def layer_names(spec: ModelSpec) -> dict[str, str]:
    """Layers with a weight and a bias that differ in name only: public layout -> diffusers."""
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
