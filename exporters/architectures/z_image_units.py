"""The modules of Z-Image that are traced.

A caption is padded to a multiple of 32 tokens with a learned token, and the image stands behind it
on the first axis of positions. Attention sees only differences of positions, so here the image is
at 0 and the caption before it, which lets captions of different lengths share a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from goc_deploy.conditions.captions import MASKED
from goc_deploy.exporters.architectures import any_size
from goc_deploy.exporters.architectures.dit import add_gated, scaled_queries
from goc_deploy.exporters.architectures.dit_model import timestep_features
from goc_deploy.exporters.architectures.wan import rms_norm, turned
from goc_deploy.spec import ModelSpec

MULTIPLE = 32  # of the tokens of a padded caption
CONDITION, INNER, FREQUENCIES = 256, 1024, 256  # widths of the time embedding
TRAIN_STEPS = 1000
norm = partial(rms_norm, epsilon=1e-5)
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def padded(bias: Tensor) -> tuple[Tensor, Tensor]:
    """The mask of captions (K, Lc) to that of padded captions, and their positions (K, Lc)."""
    tokens = (bias > MASKED / 2).float().sum(1, keepdim=True)  # (K, 1)
    count = MULTIPLE * ((tokens + MULTIPLE - 1) / MULTIPLE).to(torch.int64).float()
    positions = torch.arange(bias.shape[1]) - count
    return MASKED * (positions >= 0).float(), positions


def text_angles(positions: Tensor, spec: ModelSpec) -> tuple[Tensor, Tensor]:
    """Cosines and sines (K, 1, Lc, head width / 2) of captions, which extend along one axis."""
    assert spec.positions is not None
    first, *others = spec.positions.widths
    speeds = spec.positions.theta ** (-torch.arange(0, first, 2) / first)
    speeds = torch.cat([speeds, torch.zeros(sum(others) // 2)])
    angles = positions[:, None, :, None] * speeds
    return angles.cos(), angles.sin()


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Attention of heads (B, heads, n, head width) to (B, n, D)."""
    scores = torch.matmul(scaled_queries(q), k.transpose(-1, -2)).float()
    if bias is not None:
        scores = scores + bias
    mixed = torch.matmul(torch.softmax(scores, dim=-1).to(v.dtype), v)
    return mixed.transpose(1, 2).flatten(2)


def pytorch_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """The same, computed with PyTorch's attention."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Self-attention between two norms, without biases."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.heads, head = spec.heads, spec.hidden // spec.heads
        self.qkv = nn.Linear(spec.hidden, 3 * spec.hidden, bias=False)
        self.proj = nn.Linear(spec.hidden, spec.hidden, bias=False)
        self.norm1, self.norm2 = (nn.Parameter(torch.empty(spec.hidden)) for _ in range(2))
        self.norm_q, self.norm_k = (nn.Parameter(torch.empty(head)) for _ in range(2))

    def heads_of(self, x: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, heads, n, head width) of tokens (B, n, D)."""
        h = scaled(norm(x, self.norm1), scale).reshape(-1, x.shape[-1])
        split = self.qkv(h).reshape(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = split.unbind(0)
        return norm(q, self.norm_q), norm(k, self.norm_k), v

    def feature(self, mixed: Tensor) -> Tensor:
        """What the branch adds: (B, n, D)."""
        out = self.proj(mixed.reshape(-1, mixed.shape[-1])).reshape(mixed.shape)
        return norm(out, self.norm2)


class Swiglu(nn.Module):
    """A gated MLP between two norms, without biases."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.w1, self.w3 = (nn.Linear(spec.hidden, spec.mlp_hidden, bias=False) for _ in range(2))
        self.w2 = nn.Linear(spec.mlp_hidden, spec.hidden, bias=False)
        self.norm1, self.norm2 = (nn.Parameter(torch.empty(spec.hidden)) for _ in range(2))

    def feature(self, x: Tensor, scale: Tensor | None) -> Tensor:
        """What the branch adds to tokens (B, n, D)."""
        h = scaled(norm(x, self.norm1), scale).reshape(-1, x.shape[-1])
        return norm(self.w2(F.silu(self.w1(h)) * self.w3(h)).reshape(x.shape), self.norm2)


def scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    """``x * (1 + scale)`` for x (B, n, D) and scale (B, D), computed in float32."""
    return x if scale is None else (x.float() * (1 + scale.float().unsqueeze(1))).to(x.dtype)


class AttnUnit(Attention):
    """The unit of an attention branch: of the image, or of both streams, [image, text].

    ``spec`` are the sizes of the model. The last unit of both streams changes the image only.
    """

    def __init__(self, spec: ModelSpec, *, last: bool = False) -> None:
        super().__init__(spec)
        self.spec, self.last = spec, last

    def forward(
        self, x: Tensor, scale: Tensor, gate: Tensor, cos: Tensor, sin: Tensor, *of_text: Tensor
    ) -> tuple[Tensor, ...]:
        """Tokens to x_out (B, T, D), text_out (B, Lc, D) and their features.

        Args:
            x: (B, T, D).
            scale: (B, D).
            gate: (B, D).
            cos: (T, head width / 2) float32.
            sin: (T, head width / 2) float32.
            of_text: text (B, Lc, D), bias (K, Lc) float32 and caption_rows (B,) int64; and
                gate_text (B, D), unless the text is not changed.
        """
        return self._with(attention, x, scale, gate, (cos, sin), of_text)

    def reference(
        self, x: Tensor, scale: Tensor, gate: Tensor, cos: Tensor, sin: Tensor, *of_text: Tensor
    ) -> tuple[Tensor, ...]:
        """The same tensors, computed with PyTorch's attention."""
        return self._with(pytorch_attention, x, scale, gate, (cos, sin), of_text)

    def _with(
        self,
        attend: Attend,
        x: Tensor,
        scale: Tensor,
        gate: Tensor,
        angles: tuple[Tensor, Tensor],
        of_text: tuple[Tensor, ...],
    ) -> tuple[Tensor, ...]:
        if not of_text:
            q, k, v = self.heads_of(x, scale)
            feature = self.feature(attend(turned(q, *angles), turned(k, *angles), v, None))
            return add_gated(x, gate, feature), feature.flatten(0, 1)
        text, bias, caption_rows, *gates = of_text
        count = x.shape[1]
        q, k, v = self.heads_of(torch.cat([x, text], dim=1), scale)
        mask, positions = padded(bias.index_select(0, caption_rows))
        for_text = text_angles(positions, self.spec)
        q, k = (
            torch.cat([turned(p[:, :, :count], *angles), turned(p[:, :, count:], *for_text)], dim=2)
            for p in (q, k)
        )
        mask = torch.cat([torch.zeros_like(x[:, :, 0]).float(), mask], dim=1)[:, None, None]
        if self.last:
            feature = self.feature(attend(q[:, :, :count], k, v, mask))
            return add_gated(x, gate, feature), feature.flatten(0, 1)
        return added(x, text, gate, gates[0], self.feature(attend(q, k, v, mask)))


def added(
    x: Tensor, text: Tensor, gate: Tensor, gate_text: Tensor, feature: Tensor
) -> tuple[Tensor, ...]:
    """Both streams with a feature (B, T + Lc, D) of both, and its two parts."""
    of_image, of_text = feature[:, : x.shape[1]], feature[:, x.shape[1] :]
    return (
        add_gated(x, gate, of_image),
        add_gated(text, gate_text, of_text),
        of_image.flatten(0, 1),
        of_text.flatten(0, 1),
    )


class MlpUnit(Swiglu):
    """The unit of an MLP branch: of the image, or of both streams."""

    def forward(
        self, x: Tensor, scale: Tensor, gate: Tensor, *of_text: Tensor
    ) -> tuple[Tensor, ...]:
        """Tokens as in `AttnUnit`; ``of_text`` are text (B, Lc, D) and gate_text (B, D)."""
        if not of_text:
            feature = self.feature(x, scale)
            return add_gated(x, gate, feature), feature.flatten(0, 1)
        text, gate_text = of_text
        feature = self.feature(torch.cat([x, text], dim=1), scale)
        return added(x, text, gate, gate_text, feature)


class CaptionsUnit(nn.Module):
    """Captions to the tokens of the text, with blocks that have no modulation."""

    def __init__(self, spec: ModelSpec, blocks: int) -> None:
        super().__init__()
        self.spec = spec
        self.norm = nn.Parameter(torch.empty(spec.caption_channels))
        self.embed = nn.Linear(spec.caption_channels, spec.hidden)
        self.pad_token = nn.Parameter(torch.empty(1, spec.hidden))
        self.attn = nn.ModuleList(Attention(spec) for _ in range(blocks))
        self.mlp = nn.ModuleList(Swiglu(spec) for _ in range(blocks))

    def forward(self, captions: Tensor, bias: Tensor, caption_rows: Tensor) -> Tensor:
        """Captions (K, Lc, C) and bias (K, Lc) float32, caption_rows (B,) to text (B, Lc, D)."""
        count, tokens, width = captions.shape
        h = norm(captions.to(self.norm.dtype), self.norm).reshape(-1, width)
        embedded = self.embed(h).reshape(count, tokens, -1)
        text = torch.where((bias > MASKED / 2)[..., None], embedded, self.pad_token)
        mask, positions = padded(bias)
        angles = text_angles(positions, self.spec)
        for attn, mlp in zip(self.attn, self.mlp, strict=True):
            q, k, v = attn.heads_of(text, None)  # type: ignore[operator]
            mixed = attention(turned(q, *angles), turned(k, *angles), v, mask[:, None, None])
            text = text + attn.feature(mixed)  # type: ignore[operator]
            text = text + mlp.feature(text, None)  # type: ignore[operator]
        return text.index_select(0, caption_rows)


class ConditioningUnit(nn.Module):
    """Timesteps to the modulation table, the same for every caption."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        rows = spec.modulation
        self.gates, self.scales = len(rows.gates), sum(map(len, rows.units))
        self.hidden = spec.hidden
        self.fc1, self.fc2 = nn.Linear(FREQUENCIES, INNER), nn.Linear(INNER, CONDITION)
        self.modulation = nn.Linear(CONDITION, (self.gates + self.scales) * spec.hidden)
        self.final = nn.Linear(CONDITION, spec.hidden)

    def forward(self, t: Tensor) -> Tensor:
        """Timesteps (S,), from 1000 for noise to 0, to the table (S, M, 1, D)."""
        features = timestep_features(TRAIN_STEPS - t).to(self.fc1.weight.dtype)
        condition = self.fc2(F.silu(self.fc1(features)))
        rows = self.modulation(condition).reshape(t.shape[0], -1, self.hidden)
        scale = self.final(F.silu(condition)).unsqueeze(1)
        gates, scales = rows[:, : self.gates].tanh(), rows[:, self.gates :]
        return torch.cat([gates, torch.zeros_like(scale), scale, scales], dim=1).unsqueeze(2)


class EmbedUnit(nn.Module):
    """Latents to tokens; the values of a patch have their channels last."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.embed = nn.Linear(spec.channels * spec.patch**2, spec.hidden)

    def forward(self, latents: Tensor, rows: Tensor) -> Tensor:
        """Latents (N, C, h, p, w, p) float32 and rows (B,) to tokens (B, h, w, D)."""
        values = latents.permute(0, 2, 4, 3, 5, 1)  # (N, h, w, p, p, C)
        tokens = self.embed(values.flatten(-3).flatten(0, -2).to(self.embed.weight.dtype))
        return tokens.reshape(*values.shape[:3], -1).index_select(0, rows)


class FinalUnit(any_size.FinalUnit):
    """Tokens to the model output, whose sign is that of other flows: noise minus clean."""

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """Tokens (B, h, w, D) and modulation (B, D) to the output by patches, float32."""
        return -super().forward(x, shift, scale)
