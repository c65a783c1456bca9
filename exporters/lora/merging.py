"""A checkpoint with additions of low rank, which are merged when a tensor is read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from goc_deploy.errors import ModelError
from goc_deploy.exporters.units import Slab


@dataclass(frozen=True, slots=True)
class Addition:
    """``factor * up @ down``, which is added to rows of a tensor.

    Attributes:
        rows: the rows of a checkpoint tensor.
        down: A, (rank, inputs).
        up: B, (outputs, rank).
        factor: scale * alpha / rank.
    """

    rows: Slab
    down: Tensor
    up: Tensor
    factor: float


class MergedTensors(Mapping[str, Tensor]):
    """Tensors of a checkpoint with additions.

    A tensor with additions is computed in float32 (float64 if it is float64) whenever it is read,
    and not kept, so that one such tensor is in memory at a time. The order of the additions does
    not depend on the order of the files that the user gives.

    Args:
        tensors: the tensors of the checkpoint.
        additions: what is added, in this order.
    """

    def __init__(self, tensors: Mapping[str, Tensor], additions: Iterable[Addition]) -> None:
        self._tensors = tensors
        self._additions: defaultdict[str, list[Addition]] = defaultdict(list)
        for addition in additions:
            self._additions[addition.rows.key].append(addition)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @torch.no_grad()
    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        if name not in self._additions:
            return tensor
        merged = tensor.to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
        for addition in self._additions[name]:
            rows = merged[addition.rows.start : addition.rows.stop]
            up, down = addition.up.to(merged.dtype), addition.down.to(merged.dtype)
            rows.addmm_(up, down, alpha=addition.factor)
        if not torch.isfinite(merged).all():
            raise ModelError(
                f"{name} is not finite any more when `loras` are added to it; lower their scales"
            )
        return merged
