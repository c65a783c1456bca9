"""Models with two sets of weights for the same graphs, one for each part of the steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from goc_deploy.exporters.units import GraphKind
from goc_deploy.spec import SECOND_SET


def join_sets(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Both sets of tensors as one checkpoint, in which names of the second have a prefix."""
    return {**first, **{f"{SECOND_SET}{name}": tensor for name, tensor in second.items()}}


def split_sets(tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The sets of tensors that `join_sets` joined."""
    first: dict[str, Tensor] = {}
    second: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        of_second = name.startswith(SECOND_SET)
        (second if of_second else first)[name.removeprefix(SECOND_SET)] = tensor
    return [first, second]


def with_second_set(kinds: Sequence[GraphKind]) -> tuple[GraphKind, ...]:
    """The graphs of a model with a second copy of each, for the second set of weights."""
    return tuple(
        replace(
            kind,
            copies={
                **kind.copies,
                **{
                    f"{SECOND_SET}{name}": {
                        parameter: tuple(
                            replace(slab, key=f"{SECOND_SET}{slab.key}") for slab in slabs
                        )
                        for parameter, slabs in binding.items()
                    }
                    for name, binding in kind.copies.items()
                },
            },
        )
        for kind in kinds
    )
