"""Units whose branches are between two norms, with one set of layers for all streams they read.

A branch adds ``gate * norm2(layer(norm1(x) * (1 + scale)))``. Norms have weights, and no layer has
a bias. The streams are one sequence, [text, image].

Source: Z-Image Team, "Z-Image: An Efficient Image Generation Foundation Model with Single-Stream
Diffusion Transformer", 2025.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from goc_deploy.blocks import TEXT_FEATURE, Unit
from goc_deploy.exporters.architectures.flux_units import SwiGluMlp, joint_turned
from goc_deploy.exporters.architectures.joint import (
    Attend,
    Heads,
    Inputs,
    JointUnit,
    mask_of,
)
from goc_deploy.exporters.architectures.wan import rms_norm, turned
from goc_deploy.spec import ModelSpec

EPSILON = 1e-5
# The mask of captions (K, L) float32 to the mask that their padding has in the model, and cosines
# and sines (K, 1, L, head width / 2) of their positions.
PlaceText = Callable[[ModelSpec, Tensor], tuple[Tensor, Tensor, Tensor]]
Turn = Callable[[Tensor], Tensor]  # of (B, heads, n, head width)


class Attention(nn.Module):
    """Self-attention."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.heads = Heads(spec, bias=False, epsilon=EPSILON)
        self.proj = nn.Linear(spec.hidden, spec.hidden, bias=False)

    def forward(
        self, x: Tensor, how: Attend, turn: Turn, bias: Tensor | None, first: int = 0
    ) -> Tensor:
        """Tokens (B, n, D) to (B, n - first, D): the ``first`` tokens do not attend.

        ``turn`` turns queries and keys. For the other arguments see `joint.attend`.
        """
        q, k, v = self.heads(x).values()
        mixed = how(turn(q)[:, :, first:] if first else turn(q), turn(k), v, bias)
        projected: Tensor = self.proj(mixed.flatten(0, 1))
        return projected.reshape(mixed.shape)


class Branch(nn.Module):
    """Attention or a SwiGLU between two norms."""

    def __init__(self, spec: ModelSpec, name: str) -> None:
        super().__init__()
        attends = name == "attn"
        self.layer = Attention(spec) if attends else SwiGluMlp(spec.hidden, spec.mlp_hidden)
        self.norm1, self.norm2 = (nn.Parameter(torch.empty(spec.hidden)) for _ in range(2))

    def forward(self, x: Tensor, scale: Tensor | None, *given: Any) -> Tensor:
        """Tokens (B, n, D) and scale (B, D) to what the branch adds, (B, n, D).

        ``given`` are the other arguments of `Attention`; there are none for a SwiGLU.
        """
        h = rms_norm(x, self.norm1, EPSILON)
        if scale is not None:
            h = (h.float() * (1 + scale.float().unsqueeze(1))).to(x.dtype)
        added = self.layer(h, *given) if given else self.layer(h.flatten(0, 1)).reshape(h.shape)
        return rms_norm(added, self.norm2, EPSILON)


class NormedUnit(JointUnit):
    """The unit of a branch.

    Args:
        spec: sizes of the model.
        unit: its declaration. If it has no feature of the text that it reads, the text does not
            attend.
        names: names of its inputs.
        place: finds the positions of the text.
    """

    def __init__(
        self, spec: ModelSpec, unit: Unit, names: Sequence[str], *, place: PlaceText
    ) -> None:
        super().__init__(unit, names)
        self.spec, self.place, self.branch = spec, place, Branch(spec, unit.branch)

    def features(self, how: Attend, inputs: Inputs) -> list[Tensor]:
        """See `JointUnit`."""
        both, length = inputs["x"], 0
        if "text" in inputs:
            both, length = torch.cat([inputs["text"], both], dim=1), inputs["text"].shape[1]
        dead = 0 if TEXT_FEATURE in self.unit.features else length
        given = (how, *self._placed(inputs), dead) if self.unit.branch == "attn" else ()
        feature = self.branch(both, inputs["scale"], *given)
        parts = {"image": feature[:, length - dead :], "text": feature[:, :length]}
        return [parts[place.stream].flatten(0, 1) for place in self.unit.features]

    def _placed(self, inputs: Inputs) -> tuple[Turn, Tensor | None]:
        """What turns queries and keys of the streams that are read, and the mask of the text."""
        if "text" not in inputs:
            return partial(turned, cos=inputs["cos"], sin=inputs["sin"]), None
        mask, *angles = self.place(self.spec, inputs["bias"])
        cos, sin = (of_text.index_select(0, inputs["caption_rows"]) for of_text in angles)
        placed = {**inputs, "bias": mask, "text_cos": cos, "text_sin": sin}
        turn = partial(joint_turned, tokens=inputs["text"].shape[1], inputs=placed)
        return turn, mask_of(placed)
