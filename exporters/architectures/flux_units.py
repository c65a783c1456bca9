"""The single block of FLUX.1 and FLUX.2, and the MLP of the latter.

Source: the open models of Black Forest Labs, 2024 and 2025; arithmetic is that of diffusers'
``FluxTransformer2DModel`` and ``Flux2Transformer2DModel``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from goc_deploy.blocks import TEXT_FEATURE, Unit
from goc_deploy.exporters.architectures.dit_model import modulate
from goc_deploy.exporters.architectures.joint import Attend, Inputs, JointUnit, angles_of
from goc_deploy.exporters.architectures.wan import rms_norm, turned
from goc_deploy.spec import ModelSpec


class SingleUnit(JointUnit):
    """A single block: attention and MLP side by side, with one layer after both.

    Both streams share its modulation and its layers. The last block has no feature of the text, and
    reads keys and values of the text only.

    Args:
        spec: sizes of the model.
        unit: its declaration.
        names: names of its inputs.
        gated: whether the MLP is a SwiGLU, and all layers are without a bias, as in FLUX.2.
    """

    def __init__(
        self, spec: ModelSpec, unit: Unit, names: Sequence[str], *, gated: bool = False
    ) -> None:
        super().__init__(unit, names)
        self.last, self.heads, head = (
            TEXT_FEATURE not in unit.features,
            spec.heads,
            spec.hidden // spec.heads,
        )
        self.activation = swiglu if gated else partial(F.gelu, approximate="tanh")
        self.widths = [spec.hidden, (2 if gated else 1) * spec.mlp_hidden]
        self.kv = nn.Linear(spec.hidden, 2 * spec.hidden, bias=not gated)
        self.q_mlp = nn.Linear(spec.hidden, sum(self.widths), bias=not gated)
        self.norm_q, self.norm_k = (nn.Parameter(torch.empty(head)) for _ in range(2))
        self.proj = nn.Linear(spec.hidden + spec.mlp_hidden, spec.hidden, bias=not gated)

    def features(self, how: Attend, inputs: Inputs) -> list[Tensor]:
        """See `JointUnit`."""
        tokens, hidden = inputs["text"].shape[1:]
        both = torch.cat([inputs["text"], inputs["x"]], dim=1)  # (B, L + T, D)
        h = modulate(both, inputs["shift"], inputs["scale"])
        k, v = self.kv(h.reshape(-1, hidden)).chunk(2, dim=-1)
        rows = h[:, tokens:] if self.last else h
        q, inner = self.q_mlp(rows.reshape(-1, hidden)).split(self.widths, dim=-1)
        q, k, v = (self._heads(part, h.shape[0]) for part in (q, k, v))
        q, k = rms_norm(q, self.norm_q), rms_norm(k, self.norm_k)
        q = turned(q, *angles_of(inputs)) if self.last else joint_turned(q, tokens, inputs)
        mixed = how(q, joint_turned(k, tokens, inputs), v, None).reshape(-1, hidden)
        joint = self.proj(torch.cat([mixed, self.activation(inner)], dim=-1))
        if self.last:
            return [joint]
        joint = joint.reshape(both.shape)
        return [joint[:, tokens:].reshape(-1, hidden), joint[:, :tokens].reshape(-1, hidden)]

    def _heads(self, x: Tensor, batch: int) -> Tensor:
        """(B*n, D) to (B, heads, n, head width)."""
        return x.reshape(batch, -1, self.heads, x.shape[-1] // self.heads).transpose(1, 2)


def joint_turned(x: Tensor, tokens: int, inputs: Inputs) -> Tensor:
    """Turn x (B, heads, L + T, head width), whose first L ``tokens`` are those of the text."""
    text, image = x[:, :, :tokens], turned(x[:, :, tokens:], *angles_of(inputs))
    of_text = angles_of(inputs, "text_")
    return torch.cat([turned(text, *of_text) if of_text else text, image], dim=2)


class SwiGluMlp(nn.Module):
    """Two linear layers without biases, with SwiGLU between them."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden, 2 * inner, bias=False)
        self.fc2 = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(n, D) to (n, D)."""
        return self.fc2(swiglu(self.fc1(x)))


def swiglu(x: Tensor) -> Tensor:
    """(..., 2 * inner) to (..., inner): the first half, through SiLU, times the second.

    Source: Shazeer, "GLU Variants Improve Transformer", 2020, equation 6.
    """
    first, second = x.chunk(2, dim=-1)
    return F.silu(first) * second
