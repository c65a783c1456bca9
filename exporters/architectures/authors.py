"""Files in the layout of a model's authors, read as tensors under the names of diffusers.

The authors join layers that diffusers has apart, and have shift before scale in the modulation of
final layers. What is split stays a view of the file; only swapped halves are copied.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from goc_deploy.exporters.architectures.reading import count_blocks
from goc_deploy.exporters.tracing import KINDS

Joined = Mapping[str, tuple[str, ...]]  # layer of the authors -> layers of diffusers that it joins
KINDS_OF_AUTHORS = {"scale": "weight"}  # of norms


@dataclass(frozen=True, slots=True)
class AuthorsLayout:
    """The layers of the authors of a family.

    Attributes:
        outer: layers outside of blocks.
        blocks: prefix of the layers of a block, with ``{}`` for its number -> the prefix in
            diffusers, and the layers.
        joined: a tensor that joins queries, keys and values.
        swapped: the layers of diffusers whose halves are swapped; ``{}`` is the last block.
    """

    outer: Joined
    blocks: Mapping[str, tuple[str, Joined]]
    joined: str
    swapped: tuple[str, ...]

    def state(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a file under the names of diffusers.

        A tensor that no layer of diffusers has keeps its name, by which it is refused later.
        """
        state: dict[str, Tensor] = {}
        width = tensors[self.joined].shape[-1]
        for name, tensor in tensors.items():
            parts = self._parts(name)
            rows = [tensor]
            if len(parts) > 1 and tensor.ndim:  # the last part may be wider than the others
                starts = [i * width for i in range(len(parts))]
                stops = [*starts[1:], len(tensor)]
                rows = [tensor[i:j] for i, j in zip(starts, stops, strict=True)]
            known = len(rows) == len(parts)
            state |= dict(zip(parts, rows, strict=True)) if known else {name: tensor}
        last = count_blocks(state) - 1
        for name in [f"{layer.format(last)}.{kind}" for layer in self.swapped for kind in KINDS]:
            if name in state:
                state[name] = torch.cat(state[name].chunk(2)[::-1])
        return state

    def _parts(self, name: str) -> list[str]:
        """The tensors of diffusers that a tensor of the authors joins; none if it is unknown."""
        prefix, known, rest = "", self.outer, name
        for ours, (theirs, layers) in self.blocks.items():
            block = re.match(re.escape(ours).replace(r"\{\}", r"(\d{1,4})"), name)
            if block:
                prefix, known, rest = theirs.format(block[1]), layers, name[block.end() :]
        layer, _, kind = rest.rpartition(".")
        kind = KINDS_OF_AUTHORS.get(kind, kind)
        return [f"{prefix}{part}.{kind}" for part in known.get(layer, ())]
