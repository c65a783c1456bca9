"""The graphs of a FLUX.1: joint attention over the tokens of the text and of the image.

Every sequence is [text, image]. The positions of the text are all 0, so only queries and keys of
the image are turned.

Source: the open models of Black Forest Labs, 2024; names and arithmetic are those of diffusers'
``FluxTransformer2DModel``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from goc_deploy.exporters.architectures.dit import add_gated, scaled_queries
from goc_deploy.exporters.architectures.dit_model import (
    TIMESTEP_FREQUENCIES,
    Mlp,
    modulate,
    timestep_features,
)
from goc_deploy.exporters.architectures.wan import rms_norm, turned
from goc_deploy.spec import ModelSpec

GUIDANCE_SCALE = 1000.0  # the guidance scale is embedded like a time of 1000 times its value
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention without a mask, (B, heads, tokens, head width) each; softmax in float32."""
    scores = torch.matmul(scaled_queries(q), k.transpose(-1, -2))
    return torch.matmul(torch.softmax(scores.float(), dim=-1).to(v.dtype), v)


class Embedder(nn.Module):
    """Two linear layers with SiLU between them."""

    def __init__(self, read: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(read, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, values: Tensor) -> Tensor:
        """(n, values) float32 to (n, D)."""
        return self.linear_2(F.silu(self.linear_1(values.to(self.linear_1.weight.dtype))))


class ConditioningUnit(nn.Module):
    """Timesteps, pooled captions and the guidance scale to the modulation table.

    The gates of a single block are the same for both of its features. They are computed once and
    copied to both places.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.rows = spec.modulation
        branches = [spec.declared_units[place.unit].branch for place in spec.features]
        self.single_gates = branches.index("single")  # before them are the image's other gates
        self.shared = sum(
            branch == "single" and place.feature.stream == "text"
            for branch, place in zip(branches, spec.features, strict=True)
        )
        self.timestep_embedder = Embedder(TIMESTEP_FREQUENCIES, spec.hidden)
        self.text_embedder = Embedder(spec.pooled_channels, spec.hidden)
        if spec.embedded_guidance:
            self.guidance_embedder = Embedder(TIMESTEP_FREQUENCIES, spec.hidden)
        self.modulation = nn.Linear(spec.hidden, (self.rows.count - self.shared) * spec.hidden)

    def forward(self, t: Tensor, pooled: Tensor, guidance: Tensor | None = None) -> Tensor:
        """Everything that the modulation depends on to the table (S, M, K, D).

        Args:
            t: (S,) timesteps, from 1000 to 0.
            pooled: (K, P) float32, pooled captions.
            guidance: (1,) float32, the guidance scale; None if the model does not read it.
        """
        condition = self.timestep_embedder(timestep_features(t))  # (S, D)
        if guidance is not None:
            scale = timestep_features(GUIDANCE_SCALE * guidance)
            condition = condition + self.guidance_embedder(scale)
        both = condition.unsqueeze(1) + self.text_embedder(pooled).unsqueeze(0)  # (S, K, D)
        steps, captions, hidden = both.shape
        rows = self.modulation(F.silu(both).reshape(-1, hidden))
        rows = rows.reshape(steps, captions, -1, hidden)
        gates = self.rows.gates.stop - self.shared  # that were computed
        again = rows[:, :, self.single_gates : self.single_gates + self.shared]
        table = torch.cat([rows[:, :, :gates], again, rows[:, :, gates:]], dim=2)
        return table.transpose(1, 2)


class CaptionsUnit(nn.Module):
    """Captions to the tokens of the text at the start of every step."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.context_embedder = nn.Linear(spec.caption_channels, spec.hidden)

    def forward(self, captions: Tensor, caption_rows: Tensor) -> Tensor:
        """Captions (K, L, C) float32 and the caption (B,) of each row to text (B, L, D)."""
        count, tokens, width = captions.shape
        narrow = captions.reshape(-1, width).to(self.context_embedder.weight.dtype)
        text = self.context_embedder(narrow).reshape(count, tokens, -1)
        return text.index_select(0, caption_rows)


class Stream(nn.Module):
    """The attention layers of a stream in a double block."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.heads, head = spec.heads, spec.hidden // spec.heads
        self.qkv = nn.Linear(spec.hidden, 3 * spec.hidden)
        self.norm_q = nn.Parameter(torch.empty(head))
        self.norm_k = nn.Parameter(torch.empty(head))
        self.proj = nn.Linear(spec.hidden, spec.hidden)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Modulated tokens (B, T, D) to q, k and v (B, heads, T, head width)."""
        batch, _, hidden = x.shape
        q, k, v = self.qkv(x.reshape(-1, hidden)).chunk(3, dim=-1)
        q, k, v = (split_heads(part, batch, self.heads) for part in (q, k, v))
        return rms_norm(q, self.norm_q), rms_norm(k, self.norm_k), v


def split_heads(x: Tensor, batch: int, heads: int) -> Tensor:
    """(B*T, D) to (B, heads, T, head width)."""
    return x.reshape(batch, -1, heads, x.shape[-1] // heads).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """(B, heads, T, head width) to (B, T, D)."""
    return x.transpose(1, 2).flatten(2)


class JointUnit(nn.Module):
    """A unit with attention over both streams."""

    def forward(self, x: Tensor, text: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        """Tokens, modulation and angles to the outputs of the unit.

        Args:
            x: (B, T, D), tokens of the image.
            text: (B, L, D), tokens of the text.
            rest: the modulation, (B, D) each, in the order of the subclass; then cos and sin
                (T, head width / 2) float32.

        Returns:
            x_out (B, T, D), text_out (B, L, D), feature (B*T, D) and feature_text (B*L, D); without
            those of the text if the unit does not change it.
        """
        return self.outputs(attention, x, text, *rest)

    def reference(self, x: Tensor, text: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        """The same tensors, computed with PyTorch's attention."""
        return self.outputs(F.scaled_dot_product_attention, x, text, *rest)

    def outputs(self, attend: Attend, x: Tensor, text: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        """The outputs, with an implementation of attention."""
        raise NotImplementedError


class AttnUnit(JointUnit):
    """The attention of a double block, with layers of its own for each stream.

    Its modulation is shift, scale and gate of the image, then of the text.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.image, self.text = Stream(spec), Stream(spec)

    def outputs(self, attend: Attend, x: Tensor, text: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        """See `JointUnit`."""
        shift, scale, gate, shift_text, scale_text, gate_text, cos, sin = rest
        q, k, v = self.image(modulate(x, shift, scale))
        of_text = self.text(modulate(text, shift_text, scale_text))
        of_image = turned(q, cos, sin), turned(k, cos, sin), v
        pairs = zip(of_text, of_image, strict=True)
        mixed = join_heads(attend(*(torch.cat(pair, dim=2) for pair in pairs)))
        tokens, hidden = text.shape[1:]
        feature_text = self.text.proj(mixed[:, :tokens].reshape(-1, hidden))
        feature = self.image.proj(mixed[:, tokens:].reshape(-1, hidden))
        return added(x, gate, feature, text, gate_text, feature_text)


class MlpUnit(nn.Module):
    """The MLPs of a double block, one for each stream."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.image = Mlp(spec.hidden, spec.mlp_hidden)
        self.text = Mlp(spec.hidden, spec.mlp_hidden)

    def forward(
        self,
        x: Tensor,
        text: Tensor,
        shift: Tensor,
        scale: Tensor,
        gate: Tensor,
        shift_text: Tensor,
        scale_text: Tensor,
        gate_text: Tensor,
    ) -> tuple[Tensor, ...]:
        """Tokens (B, T or L, D) and modulation (B, D) as in `AttnUnit`, to its outputs."""
        hidden = x.shape[-1]
        feature = self.image(modulate(x, shift, scale).reshape(-1, hidden))
        feature_text = self.text(modulate(text, shift_text, scale_text).reshape(-1, hidden))
        return added(x, gate, feature, text, gate_text, feature_text)


class SingleUnit(JointUnit):
    """A single block: attention and MLP side by side, with one layer after both.

    Its modulation is shift and scale, which both streams share, gate and gate_text. Nothing reads
    the text after the last block, so this one has no gate_text, and reads keys and values of the
    text only.
    """

    def __init__(self, spec: ModelSpec, *, last: bool) -> None:
        super().__init__()
        self.last, self.heads, head = last, spec.heads, spec.hidden // spec.heads
        self.widths = [spec.hidden, spec.mlp_hidden]
        self.kv = nn.Linear(spec.hidden, 2 * spec.hidden)
        self.q_mlp = nn.Linear(spec.hidden, sum(self.widths))
        self.norm_q = nn.Parameter(torch.empty(head))
        self.norm_k = nn.Parameter(torch.empty(head))
        self.proj = nn.Linear(sum(self.widths), spec.hidden)

    def outputs(self, attend: Attend, x: Tensor, text: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        """See `JointUnit`."""
        shift, scale, gate, *gates, cos, sin = rest
        tokens, hidden = text.shape[1:]
        h = modulate(torch.cat([text, x], dim=1), shift, scale)
        joint = self._features(attend, h, tokens, cos, sin)  # (B, T or L + T, D)
        if self.last:
            return add_gated(x, gate, joint), joint.reshape(-1, hidden)
        feature = joint[:, tokens:].reshape(-1, hidden)
        return added(x, gate, feature, text, gates[0], joint[:, :tokens].reshape(-1, hidden))

    def _features(self, attend: Attend, h: Tensor, tokens: int, cos: Tensor, sin: Tensor) -> Tensor:
        """Modulated tokens (B, L + T, D), those of the text first, to features."""
        batch, _, hidden = h.shape
        k, v = self.kv(h.reshape(-1, hidden)).chunk(2, dim=-1)
        rows = h[:, tokens:] if self.last else h
        q, inner = self.q_mlp(rows.reshape(-1, hidden)).split(self.widths, dim=-1)
        q, k, v = (split_heads(part, batch, self.heads) for part in (q, k, v))
        q = turned_after(0 if self.last else tokens, rms_norm(q, self.norm_q), cos, sin)
        k = turned_after(tokens, rms_norm(k, self.norm_k), cos, sin)
        mixed = join_heads(attend(q, k, v)).reshape(-1, hidden)
        both = torch.cat([mixed, F.gelu(inner, approximate="tanh")], dim=-1)
        return self.proj(both).reshape(batch, -1, hidden)


def turned_after(tokens: int, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x (B, heads, tokens + T, head width) after the first tokens, which have position 0."""
    if not tokens:
        return turned(x, cos, sin)
    return torch.cat([x[:, :, :tokens], turned(x[:, :, tokens:], cos, sin)], dim=2)


def added(
    x: Tensor,
    gate: Tensor,
    feature: Tensor,
    text: Tensor,
    gate_text: Tensor,
    feature_text: Tensor,
) -> tuple[Tensor, ...]:
    """The outputs of a unit that changes both streams."""
    x_out = add_gated(x, gate, feature.reshape(x.shape))
    text_out = add_gated(text, gate_text, feature_text.reshape(text.shape))
    return x_out, text_out, feature, feature_text
