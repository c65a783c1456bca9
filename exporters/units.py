"""What an architecture gives the exporter: graphs to trace, and which tensors each copy of a graph holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from goc_deploy.precision import DTYPE_OF_PRECISION

DTYPES: Mapping[str, torch.dtype] = {
    precision: getattr(torch, dtype) for precision, dtype in DTYPE_OF_PRECISION.items()
}


@dataclass(frozen=True, slots=True)
class Slab:
    """Rows ``start:stop`` (first dimension) of a checkpoint tensor; all of them by default."""

    key: str
    start: int = 0
    stop: int | None = None

    def read(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The rows as one contiguous tensor."""
        tensor = tensors[self.key]
        rows = (
            tensor[self.start : self.stop]
            if tensor.ndim and (self.start or self.stop is not None)
            else tensor
        )
        return rows.to(dtype).contiguous()


Binding = Mapping[str, tuple[Slab, ...]]


@dataclass(frozen=True, slots=True)
class Input:
    """A graph input: an example and the names of its dynamic dimensions.

    Attributes:
        name: tensor name.
        example: values for tracing and for the comparison with PyTorch.
        dynamic: dimension -> symbol; dimensions with one symbol are equal.
    """

    name: str
    example: Tensor
    dynamic: Mapping[int, str]


@dataclass(frozen=True, slots=True)
class UnitKind:
    """Isomorphic units: traced once, then written once per copy with that copy's weights.

    Attributes:
        kind: name of the kind.
        module: what is traced; its parameters' values do not matter, its ``reference`` method (or ``forward``) is what
            the exported graph is compared with.
        inputs: graph inputs in the order of ``forward``.
        outputs: names of the outputs.
        copies: unit name -> parameter name -> slabs, joined along the first dimension.
        weights_are_inputs: the parameters become inputs of the graph, which the runtime maps instead of copying: for
            graphs that run once per request.
    """

    kind: str
    module: nn.Module
    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]
    copies: Mapping[str, Binding]
    weights_are_inputs: bool = False
