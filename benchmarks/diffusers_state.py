"""The tensors of a DiT under diffusers' names: the exporter's mapping in the other direction."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from goc_deploy.exporters.architectures.dit_diffusers import layer_names
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
