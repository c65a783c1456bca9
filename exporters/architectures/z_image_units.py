"""The modules of Z-Image that are traced.

A caption is padded to a multiple of 32 tokens with a learned token, and the image stands behind it
on the first axis of positions. Attention sees only differences of positions, so here the image is
at 0 and the caption before it, which lets captions of different lengths share a batch. A sequence
of both is [image, text].
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from goc_deploy.blocks import TEXT_FEATURE, Unit
from goc_deploy.conditions.captions import MASKED
from goc_deploy.exporters.architectures import any_size
from goc_deploy.exporters.architectures.contract import own_positions
from goc_deploy.exporters.architectures.dit_model import TIMESTEP_FREQUENCIES, timestep_features
from goc_deploy.exporters.architectures.joint import (
    STREAM_INPUTS,
    Attend,
    Inputs,
    JointUnit,
    angles_of,
    attend,
    changed_by,
)
from goc_deploy.exporters.architectures.wan import rms_norm, turned
from goc_deploy.spec import ModelSpec

MULTIPLE = 32  # of the tokens of a padded caption
CONDITION, INNER = 256, 1024  # widths of the time embedding
TRAIN_STEPS = 1000
norm = partial(rms_norm, epsilon=1e-5)


def padded(bias: Tensor) -> tuple[Tensor, Tensor]:
    """The mask of captions (K, Lc) to that of padded captions, and their positions (K, Lc)."""
    tokens = (bias > MASKED / 2).float().sum(1, keepdim=True)  # (K, 1)
    count = MULTIPLE * ((tokens + MULTIPLE - 1) / MULTIPLE).to(torch.int64).float()
    positions = torch.arange(bias.shape[1]) - count
    return MASKED * (positions >= 0).float(), positions


def text_angles(positions: Tensor, spec: ModelSpec) -> tuple[Tensor, Tensor]:
    """Cosines and sines (K, 1, Lc, head width / 2) of captions, which extend along one axis."""
    first, *others = own_positions(spec).widths
    speeds = own_positions(spec).theta ** (-torch.arange(0, first, 2) / first)
    speeds = torch.cat([speeds, torch.zeros(sum(others) // 2)])
    angles = positions[:, None, :, None] * speeds
    return angles.cos(), angles.sin()


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


class AttnUnit(JointUnit):
    """The unit of an attention branch: of the image, or of both streams."""

    def __init__(self, spec: ModelSpec, unit: Unit, names: Sequence[str]) -> None:
        super().__init__(unit, names)
        self.spec, self.attn = spec, Attention(spec)

    def features(self, how: Attend, inputs: Inputs) -> list[Tensor]:
        """See `JointUnit`."""
        tokens, count = joined(inputs, self.unit.reads), inputs["x"].shape[1]
        q, k, v = self.attn.heads_of(tokens, inputs["scale"])
        angles = angles_of(inputs)
        if "text" not in inputs:
            mixed = how(turned(q, *angles), turned(k, *angles), v, None)
            return [self.attn.feature(mixed).flatten(0, 1)]
        mask, places = padded(inputs["bias"].index_select(0, inputs["caption_rows"]))
        of_text = text_angles(places, self.spec)
        q, k = (
            torch.cat([turned(p[:, :, :count], *angles), turned(p[:, :, count:], *of_text)], dim=2)
            for p in (q, k)
        )
        mask = torch.cat([torch.zeros_like(tokens[:, :count, 0]).float(), mask], dim=1)
        if TEXT_FEATURE not in self.unit.features:
            q = q[:, :, :count]
        feature = self.attn.feature(how(q, k, v, mask[:, None, None]))
        return parts_of(feature, count, self.unit)


class MlpUnit(JointUnit):
    """The unit of an MLP branch: of the image, or of both streams."""

    def __init__(self, spec: ModelSpec, unit: Unit, names: Sequence[str]) -> None:
        super().__init__(unit, names)
        self.mlp = Swiglu(spec)

    def features(self, how: Attend, inputs: Inputs) -> list[Tensor]:  # noqa: ARG002
        """See `JointUnit`."""
        feature = self.mlp.feature(joined(inputs, changed_by(self.unit)), inputs["scale"])
        return parts_of(feature, inputs["x"].shape[1], self.unit)


def joined(inputs: Inputs, streams: Sequence[str]) -> Tensor:
    """The tokens of streams as one sequence (B, n, D)."""
    tokens = [inputs[STREAM_INPUTS[stream]] for stream in streams]
    return tokens[0] if len(tokens) == 1 else torch.cat(tokens, dim=1)


def parts_of(feature: Tensor, count: int, unit: Unit) -> list[Tensor]:
    """The features of a unit, (B, T, D) or of both streams (B, T + Lc, D), by streams of (n, D).

    ``count`` is T.
    """
    if len(unit.features) == 1:
        return [feature.flatten(0, 1)]
    return [feature[:, :count].flatten(0, 1), feature[:, count:].flatten(0, 1)]


class CaptionsUnit(nn.Module):
    """Captions to the tokens of the text, with ``count`` blocks that have no modulation."""

    def __init__(self, spec: ModelSpec, count: int) -> None:
        super().__init__()
        self.spec = spec
        self.norm = nn.Parameter(torch.empty(spec.caption_channels))
        self.embed = nn.Linear(spec.caption_channels, spec.hidden)
        self.pad_token = nn.Parameter(torch.empty(1, spec.hidden))
        self.attn = nn.ModuleList(Attention(spec) for _ in range(count))
        self.mlp = nn.ModuleList(Swiglu(spec) for _ in range(count))

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
            mixed = attend(turned(q, *angles), turned(k, *angles), v, mask[:, None, None])
            text = text + attn.feature(mixed)  # type: ignore[operator]
            text = text + mlp.feature(text, None)  # type: ignore[operator]
        return text.index_select(0, caption_rows)


class ConditioningUnit(nn.Module):
    """Timesteps to the modulation table, the same for every caption.

    Args:
        spec: sizes of the model.
        places: for each row of the table but those of the final layer, its place among the rows
            that are computed. Both features of a unit have one gate.
    """

    def __init__(self, spec: ModelSpec, places: Sequence[int]) -> None:
        super().__init__()
        self.gates, self.places, self.hidden = len(spec.features), list(places), spec.hidden
        self.fc1, self.fc2 = nn.Linear(TIMESTEP_FREQUENCIES, INNER), nn.Linear(INNER, CONDITION)
        self.modulation = nn.Linear(CONDITION, (max(places) + 1) * spec.hidden)
        self.final = nn.Linear(CONDITION, spec.hidden)

    def forward(self, t: Tensor) -> Tensor:
        """Timesteps (S,), from 1000 for noise to 0, to the table (S, M, 1, D)."""
        features = timestep_features(TRAIN_STEPS - t).to(self.fc1.weight.dtype)
        condition = self.fc2(F.silu(self.fc1(features)))
        rows = self.modulation(condition).reshape(t.shape[0], -1, self.hidden)
        rows = rows.index_select(1, torch.tensor(self.places))
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
