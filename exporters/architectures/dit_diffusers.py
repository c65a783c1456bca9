"""A DiT as diffusers saves it: its configuration, and its tensors under the names of the public DiT layout."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from goc_deploy.errors import ModelError
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
    sizes={**TRANSFORMER_SIZES, "sample_size": 32},
    required={
        "_class_name": ("DiTTransformer2DModel", OLD_CLASS),
        "norm_type": ("ada_norm_zero",),
        **TRANSFORMER_REQUIRED,
        "cross_attention_dim": (None,),
        "caption_channels": (None,),
        "interpolation_scale": (None, 1, 1.0),
        "use_additional_conditions": (None, False),
    },
    read=("out_channels", "norm_eps"),
)
FREQUENCY_SHIFT = (
    1  # diffusers spreads its 128 frequencies over 127 intervals, the public DiT code over 128
)
DEFAULT_NORM_EPS = 1e-5
_EMBEDDER = re.compile(r"transformer_blocks\.(\d+)\.norm1\.emb\.(.+)")


def spec_from_config(config: Mapping[str, Any], where: str) -> ModelSpec:
    """Sizes of the model that a ``config.json`` describes.

    Raises:
        ModelError: naming the setting that is unknown, not supported or out of range.
    """
    size = SETTINGS.check(config, where)
    channels, patch, norm_eps = (
        size["in_channels"],
        size["patch_size"],
        config.get("norm_eps", DEFAULT_NORM_EPS),
    )
    learn_sigma = predicts_sigma(config, channels, None, where)
    if not isinstance(norm_eps, float) or not 0 < norm_eps < 1:
        raise ModelError(f"{where}: norm_eps must be a number between 0 and 1, got {norm_eps!r}")
    hidden = transformer_width(size, 4, "a sine and a cosine per axis", where)
    return ModelSpec(
        depth=size["num_layers"],
        hidden=hidden,
        heads=size["num_attention_heads"],
        mlp_hidden=4 * hidden,
        patch=patch,
        grid=size["sample_size"] // patch,
        channels=channels,
        classes=size["num_embeds_ada_norm"],
        learn_sigma=learn_sigma,
        frequency_shift=FREQUENCY_SHIFT,
        mlp_norm_eps=norm_eps,
        guided_channels=channels,
    )


def state_from_diffusers(
    found: Mapping[str, Tensor], spec: ModelSpec, where: Path
) -> tuple[ModelSpec, dict[str, Tensor]]:
    """Tensors of a DiTTransformer2DModel under the names of the public DiT layout.

    q, k and v are joined, and the position table is computed where diffusers did not save it. diffusers keeps embedders in
    every block: where they are equal, as in a converted checkpoint, they are taken once; where they are not, as in a model
    that was trained in diffusers, every block keeps its own, under its name.

    Raises:
        ModelError: listing tensors that are missing or left over.
    """
    own = any(not _equals_block_0(name, found) for name in found)
    spec = replace(spec, block_embedders=own)
    kept = {
        name: tensor for name, tensor in found.items() if own or not _is_repeated_embedder(name)
    }
    names = Renaming(kept, where)
    table = names.rest.pop("pos_embed.pos_embed", None)
    state = {"pos_embed": position_table(spec.hidden, spec.grid) if table is None else table}
    state |= names.take_layers(layer_names(spec))
    state |= names.take_tensors(
        {
            f"{here}y_embedder.embedding_table.weight": f"{there}.class_embedder.embedding_table.weight"
            for here, there in embedders(spec).items()
        }
    )
    for block in range(spec.depth):
        parts = [f"transformer_blocks.{block}.attn1.to_{part}" for part in "qkv"]
        state |= names.take_joined(f"blocks.{block}.attn.qkv", parts)
    names.finish()
    return spec, state


def embedders(spec: ModelSpec) -> dict[str, str]:
    """Where embedders stand: prefix of their names in the public layout -> module in diffusers."""
    if spec.block_embedders:
        return {f"blocks.{i}.": f"transformer_blocks.{i}.norm1.emb" for i in range(spec.depth)}
    return {"": "transformer_blocks.0.norm1.emb"}


def layer_names(spec: ModelSpec) -> dict[str, str]:
    """Layers with a weight and a bias that differ in name only: public DiT layout -> diffusers."""
    names = {
        "x_embedder.proj": "pos_embed.proj",
        "final_layer.adaLN_modulation.1": "proj_out_1",
        "final_layer.linear": "proj_out_2",
    }
    for here, there in embedders(spec).items():
        names[f"{here}t_embedder.mlp.0"] = f"{there}.timestep_embedder.linear_1"
        names[f"{here}t_embedder.mlp.2"] = f"{there}.timestep_embedder.linear_2"
    for i in range(spec.depth):
        block, there = f"blocks.{i}", f"transformer_blocks.{i}"
        names[f"{block}.adaLN_modulation.1"] = f"{there}.norm1.linear"
        names[f"{block}.attn.proj"] = f"{there}.attn1.to_out.0"
        names[f"{block}.mlp.fc1"] = f"{there}.ff.net.0.proj"
        names[f"{block}.mlp.fc2"] = f"{there}.ff.net.2"
    return names


def position_table(hidden: int, grid: int, stretch: float = 1) -> Tensor:
    """Sines and cosines of a token's column, then of its row: (1, grid * grid, hidden) float32.

    ``stretch`` is how many tokens lie within a distance of 1.

    Source: Vaswani et al., "Attention Is All You Need", NeurIPS 2017, section 3.5, in two dimensions.
    """
    frequencies = 10_000.0 ** (-torch.arange(hidden // 4, dtype=torch.float64) / (hidden // 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] / stretch * frequencies
    axis = torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)  # (grid, hidden / 2)
    columns, rows = axis.repeat(grid, 1), axis.repeat_interleave(grid, 0)
    return torch.cat([columns, rows], dim=1).float().unsqueeze(0)


def _is_repeated_embedder(name: str) -> bool:
    match = _EMBEDDER.fullmatch(name)
    return match is not None and match[1] != "0"


def _equals_block_0(name: str, found: Mapping[str, Tensor]) -> bool:
    """Whether a tensor is no embedder, or the same as that of block 0."""
    match = _EMBEDDER.fullmatch(name)
    if match is None or match[1] == "0":
        return True
    first = found.get(f"transformer_blocks.0.norm1.emb.{match[2]}")
    return first is not None and torch.equal(first, found[name])
