"""Tensors under diffusers' names: the exporter's mappings in the other direction."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from goc_deploy.exporters.architectures.dit_diffusers import layer_names
from goc_deploy.exporters.architectures.pixart_diffusers import layers_in_diffusers
from goc_deploy.spec import ModelSpec


def diffusers_state(state: Mapping[str, Tensor], spec: ModelSpec) -> dict[str, Tensor]:
    """The state dict for ``DiTTransformer2DModel.load_state_dict``.

    Nothing is copied. All blocks share one embedder.
    """
    kinds, found = ("weight", "bias"), {}
    for ours, theirs in layer_names(spec).items():
        for kind in kinds:
            found[f"{theirs}.{kind}"] = state[f"{ours}.{kind}"]
    for i in range(spec.depth):
        block = f"transformer_blocks.{i}"
        embedders = f"{block}.norm1.emb"
        found[f"{embedders}.class_embedder.embedding_table.weight"] = state[
            "y_embedder.embedding_table.weight"
        ]
        for kind in kinds:
            found[f"{embedders}.timestep_embedder.linear_1.{kind}"] = state[
                f"t_embedder.mlp.0.{kind}"
            ]
            found[f"{embedders}.timestep_embedder.linear_2.{kind}"] = state[
                f"t_embedder.mlp.2.{kind}"
            ]
            for name, part in zip(
                "qkv", state[f"blocks.{i}.attn.qkv.{kind}"].chunk(3), strict=True
            ):
                found[f"{block}.attn1.to_{name}.{kind}"] = part
    return found


def pixart_state(state: Mapping[str, Tensor], spec: ModelSpec) -> dict[str, Tensor]:
    """The state dict for ``PixArtTransformer2DModel.load_state_dict``.

    Nothing is copied. The position table, which diffusers does not save, is left out.
    """
    found = {"scale_shift_table": state["final_layer.scale_shift_table"]}
    for i in range(spec.depth):
        table = "scale_shift_table"
        found[f"transformer_blocks.{i}.{table}"] = state[f"blocks.{i}.{table}"]
    for ours, theirs in layers_in_diffusers(spec).items():
        for kind in ("weight", "bias"):
            parts = state[f"{ours}.{kind}"].chunk(len(theirs))
            found |= {f"{name}.{kind}": part for name, part in zip(theirs, parts, strict=True)}
    return found
