"""A small PixArt whose modulation depends on a pooled embedding and an embedded guidance scale too.

One linear layer turns the pooled embedding into a vector, which is multiplied by the guidance scale
and added to every row of the modulation except the gates of cross-attention. Adding it to the
tables of the blocks is the same, so the plain PyTorch of `tests.pixart_reference` draws with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from goc_deploy.exporters.architectures.pixart import (
    PIXART,
    ConditioningUnit,
    check_tensors,
    graph_kinds,
    spec_from_tensors,
)
from goc_deploy.exporters.tracing import Examples, empty_module
from goc_deploy.exporters.units import DTYPES, GraphKind, Input, Slab
from goc_deploy.precision import Precision
from goc_deploy.spec import ModelSpec
from tests.pixart_reference import SPEC as TOLD_SPEC
from tests.pixart_reference import random_state as pixart_state

NAME, POOLED = "pixart-pooled", 6
# A width whose tensors lie at addresses that TensorRT takes:
PIXART_SPEC = replace(TOLD_SPEC, hidden=64, heads=4, mlp_hidden=256, told_size=0)
CHANGES = {"architecture": NAME, "pooled_channels": POOLED, "embedded_guidance": True}
SPEC = replace(PIXART_SPEC, **CHANGES)
OWN = ("pooled_embedder.weight", "pooled_embedder.bias")


class PooledConditioning(nn.Module):
    """Timesteps, pooled embeddings and guidance to the modulation table (S, M, K, D)."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.pixart = ConditioningUnit(spec)
        self.pooled_embedder = nn.Linear(spec.pooled_channels, spec.hidden)
        rows, gates = spec.modulation.count, spec.modulation.gates
        self.moves = [not (row in gates and row % 3 == 1) for row in range(rows)]

    def forward(self, t: Tensor, pooled: Tensor, guidance: Tensor) -> Tensor:
        table = self.pixart(t)  # (S, M, 1, D)
        moves = torch.tensor(self.moves, dtype=table.dtype).reshape(1, -1, 1, 1)
        dtype = self.pooled_embedder.weight.dtype
        vector = self.pooled_embedder(pooled.to(dtype)) * guidance.to(dtype)
        return table + moves * vector  # (S, M, K, D)


def random_state(seed: int = 0) -> dict[str, Tensor]:
    """A checkpoint of the family."""
    generator = torch.Generator().manual_seed(seed + 1)
    shapes = ((SPEC.hidden, POOLED), (SPEC.hidden,))
    own = {
        name: 0.3 * torch.randn(shape, generator=generator)
        for name, shape in zip(OWN, shapes, strict=True)
    }
    return {**pixart_state(PIXART_SPEC, seed), **own}


def state_of_rows(
    state: Mapping[str, Tensor], pooled: Tensor, guidance: float
) -> dict[str, Tensor]:
    """The state of a PixArt whose row i of the batch has the pooled embedding i (B, P)."""
    vector = guidance * F.linear(pooled, *(state[name] for name in OWN)).unsqueeze(1)  # (B, 1, D)
    return {
        name: tensor + vector if name.endswith("scale_shift_table") else tensor
        for name, tensor in state.items()
    }


def _spec(tensors: Mapping[str, Tensor], heads: int | None) -> ModelSpec:
    return replace(spec_from_tensors(tensors, heads), **CHANGES)


def _check(tensors: Mapping[str, Tensor], spec: ModelSpec) -> None:
    check_tensors({name: value for name, value in tensors.items() if name not in OWN}, spec)


def _kinds(spec: ModelSpec, precision: Precision) -> tuple[GraphKind, ...]:
    dtype = DTYPES[precision]
    examples = Examples(spec, dtype)
    module = empty_module(lambda: PooledConditioning(spec), dtype, examples.generator)
    pooled = examples.normal(2, POOLED, dtype=torch.float32)
    conditioning, *others = graph_kinds(spec, precision)
    (binding,) = conditioning.copies.values()
    own = {f"pixart.{name}": slabs for name, slabs in binding.items()}
    own |= {name: (Slab(name),) for name in OWN}
    kind = replace(
        conditioning,
        module=module,
        inputs=(
            *conditioning.inputs,
            Input("pooled", pooled, {0: "captions"}),
            Input("guidance", torch.tensor([2.5]), {}),
        ),
        copies={"conditioning": own},
    )
    return (kind, *others)


FAMILY = replace(
    PIXART, name=NAME, spec_from_tensors=_spec, check_tensors=_check, graph_kinds=_kinds
)
