"""A DiT that diffusers saved: its configuration, and its tensors in the public DiT layout."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
from msgspec import Meta
from torch import Tensor

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
from goc_deploy.size_inputs import sine_table
from goc_deploy.spec import ModelSpec

# diffusers spreads its 128 frequencies over 127 intervals, the public DiT code over 128.
FREQUENCY_SHIFT = 1


class DiTConfig(TransformerConfig, frozen=True, kw_only=True):
    """The settings of a DiTTransformer2DModel that are read."""

    sample_size: Setting = 32
    norm_eps: Annotated[float, Meta(gt=0, lt=1)] = 1e-5


SETTINGS = Settings(
    DiTConfig,
    required={
        "_class_name": ("DiTTransformer2DModel", OLD_CLASS),
        "norm_type": ("ada_norm_zero",),
        **TRANSFORMER_REQUIRED,
        "cross_attention_dim": (None,),
        "caption_channels": (None,),
        "interpolation_scale": (None, 1, 1.0),
        "use_additional_conditions": (None, False),
    },
)
_EMBEDDER = re.compile(r"transformer_blocks\.(\d+)\.norm1\.emb\.(.+)")


def spec_from_config(config: Mapping[str, Any], where: str) -> ModelSpec:
    """The sizes of the model that a ``config.json`` describes.

    Raises:
        ModelError: a setting is unknown, not supported or out of range; the message names it.
    """
    settings = SETTINGS.read(config, where)
    hidden = transformer_width(settings, 4, "a sine and a cosine per axis", where)
    return ModelSpec(
        depth=settings.num_layers,
        hidden=hidden,
        heads=settings.num_attention_heads,
        mlp_hidden=4 * hidden,
        patch=settings.patch_size,
        grid=settings.sample_size // settings.patch_size,
        channels=settings.in_channels,
        choices=settings.num_embeds_ada_norm,
        learn_sigma=predicts_sigma(settings, where),
        frequency_shift=FREQUENCY_SHIFT,
        mlp_norm_eps=settings.norm_eps,
        guided_channels=settings.in_channels,
    )


def state_from_diffusers(
    tensors: Mapping[str, Tensor], spec: ModelSpec, where: Path
) -> tuple[ModelSpec, dict[str, Tensor]]:
    """The tensors of a DiTTransformer2DModel under the names of the public DiT layout.

    q, k and v are joined. The position table is computed if diffusers did not save it. diffusers
    has embedders in every block. If they are equal, as in a converted checkpoint, they are used
    once. If they differ, as in a model that was trained in diffusers, every block keeps its own
    embedders.

    Returns:
        The spec, with ``block_embedders`` set, and the tensors by name.

    Raises:
        ModelError: tensors are missing or left over; the message lists them.
    """
    own = any(not _equals_block_0(name, tensors) for name in tensors)
    spec = replace(spec, block_embedders=own)
    kept = {
        name: tensor for name, tensor in tensors.items() if own or not _is_repeated_embedder(name)
    }
    names = Renaming(kept, where)
    table = names.rest.pop("pos_embed.pos_embed", None)
    state = {"pos_embed": position_table(spec) if table is None else table}
    state |= names.take_layers(layer_names(spec))
    table_name = "embedding_table.weight"
    state |= names.take_tensors(
        {
            f"{new}y_embedder.{table_name}": f"{old}.class_embedder.{table_name}"
            for new, old in embedders(spec).items()
        }
    )
    for layer, parts in joined_layers(spec).items():
        state |= names.take_joined(layer, parts)
    names.finish()
    return spec, state


def embedders(spec: ModelSpec) -> dict[str, str]:
    """The embedders of a model: prefix of their names in the public layout -> diffusers module."""
    if spec.block_embedders:
        return {f"blocks.{i}.": f"transformer_blocks.{i}.norm1.emb" for i in range(spec.depth)}
    return {"": "transformer_blocks.0.norm1.emb"}


def layer_names(spec: ModelSpec) -> dict[str, str]:
    """Layers that differ in name only: name in the public DiT layout -> name in diffusers."""
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


def joined_layers(spec: ModelSpec) -> dict[str, tuple[str, ...]]:
    """Layers that join several of diffusers: name in the public layout -> names in diffusers."""
    return {
        f"blocks.{i}.attn.qkv": tuple(f"transformer_blocks.{i}.attn1.to_{part}" for part in "qkv")
        for i in range(spec.depth)
    }


def layers_in_diffusers(spec: ModelSpec) -> dict[str, tuple[str, ...]]:
    """Layers in the public layout -> the layers in diffusers that each one joins.

    Embedders are left out if all blocks share them, because diffusers has them in every block.
    """
    names = {
        new: (old,)
        for new, old in layer_names(spec).items()
        if spec.block_embedders or not new.startswith("t_embedder.")
    }
    return names | joined_layers(spec)


def position_table(spec: ModelSpec, stretch: float = 1) -> Tensor:
    """The position table of a model, (1, T, D) float32; see `goc_deploy.size_inputs.sine_table`."""
    rows, columns = spec.axes
    table = sine_table(spec.hidden, rows, columns, rows, stretch)
    return torch.from_numpy(table).reshape(1, spec.tokens, spec.hidden)


def _is_repeated_embedder(name: str) -> bool:
    match = _EMBEDDER.fullmatch(name)
    return match is not None and match[1] != "0"


def _equals_block_0(name: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a tensor belongs to no embedder, or equals the same tensor of block 0."""
    match = _EMBEDDER.fullmatch(name)
    if match is None or match[1] == "0":
        return True
    first = tensors.get(f"transformer_blocks.0.norm1.emb.{match[2]}")
    return first is not None and torch.equal(first, tensors[name])
