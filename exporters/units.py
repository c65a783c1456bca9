"""The graphs of an architecture: modules to trace, and the tensors of each copy."""

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
    """Rows ``start:stop`` (first dimension) of a checkpoint tensor; by default all rows."""

    key: str
    start: int = 0
    stop: int | None = None

    def read(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The rows as one contiguous tensor of a dtype."""
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
        dynamic: dimension -> symbol; dimensions with the same symbol are equal. ``2*SYMBOL`` is
            twice the dimension of another symbol.
    """

    name: str
    example: Tensor
    dynamic: Mapping[int, str]


@dataclass(frozen=True, slots=True)
class GraphKind:
    """Isomorphic graphs: traced once, then written once per copy with the weights of that copy.

    Attributes:
        kind: name of the kind.
        module: the module to trace; the values of its parameters do not matter. The exported graph
            is compared with its ``reference`` method, or with ``forward``.
        inputs: graph inputs in the order of ``forward``.
        outputs: names of the outputs.
        copies: name of the copy -> parameter name -> slabs, joined along the first dimension.
        weights_are_inputs: whether the parameters become inputs of the graph, which the runtime
            maps instead of copying. This is for graphs that run once per request.
    """

    kind: str
    module: nn.Module
    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]
    copies: Mapping[str, Binding]
    weights_are_inputs: bool = False
