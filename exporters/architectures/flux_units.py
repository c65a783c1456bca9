"""The graphs of FLUX.1, and those of FLUX.2 that are alike: joint attention over two streams.

Every sequence is [text, image]. In FLUX.1 the positions of the text are all 0, so only queries and
keys of the image are turned.

Source: the open models of Black Forest Labs, 2024 and 2025; names and arithmetic are those of
diffusers' ``FluxTransformer2DModel`` and ``Flux2Transformer2DModel``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from goc_deploy.exporters.architectures.dit import add_gated, scaled_queries
from goc_deploy.exporters.architectures.dit_model import (
    Mlp,
    modulate,
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

    def __init__(self, read: int, width: int, *, bias: bool = True) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(read, width, bias=bias)
        self.linear_2 = nn.Linear(width, width, bias=bias)

    def forward(self, values: Tensor) -> Tensor:
        """(n, values) float32 to (n, D)."""
        return self.linear_2(F.silu(self.linear_1(values.to(self.linear_1.weight.dtype))))


class CaptionsUnit(nn.Module):
    """Captions to the tokens of the text at the start of every step."""

    def __init__(self, spec: ModelSpec, *, bias: bool = True) -> None:
        super().__init__()
        self.context_embedder = nn.Linear(spec.caption_channels, spec.hidden, bias=bias)

    def forward(self, captions: Tensor, caption_rows: Tensor) -> Tensor:
        """Captions (K, L, C) float32 and the caption (B,) of each row to text (B, L, D)."""
        count, tokens, width = captions.shape
        narrow = captions.reshape(-1, width).to(self.context_embedder.weight.dtype)
        text = self.context_embedder(narrow).reshape(count, tokens, -1)
        return text.index_select(0, caption_rows)


class Stream(nn.Module):
    """The attention layers of a stream in a double block."""

    def __init__(self, spec: ModelSpec, *, bias: bool = True) -> None:
        super().__init__()
        self.heads, head = spec.heads, spec.hidden // spec.heads
        self.qkv = nn.Linear(spec.hidden, 3 * spec.hidden, bias=bias)
        self.norm_q = nn.Parameter(torch.empty(head))
        self.norm_k = nn.Parameter(torch.empty(head))
        self.proj = nn.Linear(spec.hidden, spec.hidden, bias=bias)

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
                (T, head width / 2) float32, and text_cos and text_sin (L, head width / 2) of a
                model that turns the text.

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

    def __init__(self, spec: ModelSpec, *, bias: bool = True) -> None:
        super().__init__()
        self.image, self.text = Stream(spec, bias=bias), Stream(spec, bias=bias)

    def outputs(self, attend: Attend, x: Tensor, text: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        """See `JointUnit`."""
        shift, scale, gate, shift_text, scale_text, gate_text, cos, sin, *of_text = rest
        q, k, v = self.image(modulate(x, shift, scale))
        q_text, k_text, v_text = self.text(modulate(text, shift_text, scale_text))
        if of_text:
            q_text, k_text = turned(q_text, *of_text), turned(k_text, *of_text)
        pairs = ((q_text, turned(q, cos, sin)), (k_text, turned(k, cos, sin)), (v_text, v))
        mixed = join_heads(attend(*(torch.cat(pair, dim=2) for pair in pairs)))
        tokens, hidden = text.shape[1:]
        feature_text = self.text.proj(mixed[:, :tokens].reshape(-1, hidden))
        feature = self.image.proj(mixed[:, tokens:].reshape(-1, hidden))
        return added(x, gate, feature, text, gate_text, feature_text)


class MlpUnit(nn.Module):
    """The MLPs of a double block, one for each stream."""

    def __init__(self, spec: ModelSpec, make: Callable[[int, int], nn.Module] = Mlp) -> None:
        super().__init__()
        self.image = make(spec.hidden, spec.mlp_hidden)
        self.text = make(spec.hidden, spec.mlp_hidden)

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

    Args:
        spec: sizes of the model.
        last: whether it is the last block.
        gated: whether the MLP is a SwiGLU, and all layers are without a bias, as in FLUX.2.
    """

    def __init__(self, spec: ModelSpec, *, last: bool, gated: bool = False) -> None:
        super().__init__()
        self.last, self.heads, head = last, spec.heads, spec.hidden // spec.heads
        self.activation = swiglu if gated else partial(F.gelu, approximate="tanh")
        self.widths = [spec.hidden, (2 if gated else 1) * spec.mlp_hidden]
        self.kv = nn.Linear(spec.hidden, 2 * spec.hidden, bias=not gated)
        self.q_mlp = nn.Linear(spec.hidden, sum(self.widths), bias=not gated)
        self.norm_q = nn.Parameter(torch.empty(head))
        self.norm_k = nn.Parameter(torch.empty(head))
        inner = spec.hidden + spec.mlp_hidden
        self.proj = nn.Linear(inner, spec.hidden, bias=not gated)

    def outputs(self, attend: Attend, x: Tensor, text: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        """See `JointUnit`."""
        shift, scale, gate, *angles = rest
        tokens, hidden = text.shape[1:]
        gate_text = gate if self.last else angles.pop(0)
        h = modulate(torch.cat([text, x], dim=1), shift, scale)
        joint = self._features(attend, h, tokens, angles)  # (B, T or L + T, D)
        if self.last:
            return add_gated(x, gate, joint), joint.reshape(-1, hidden)
        feature = joint[:, tokens:].reshape(-1, hidden)
        return added(x, gate, feature, text, gate_text, joint[:, :tokens].reshape(-1, hidden))

    def _features(self, attend: Attend, h: Tensor, tokens: int, angles: Sequence[Tensor]) -> Tensor:
        """Modulated tokens (B, L + T, D), those of the text first, to features."""
        batch, _, hidden = h.shape
        k, v = self.kv(h.reshape(-1, hidden)).chunk(2, dim=-1)
        rows = h[:, tokens:] if self.last else h
        q, inner = self.q_mlp(rows.reshape(-1, hidden)).split(self.widths, dim=-1)
        q, k, v = (split_heads(part, batch, self.heads) for part in (q, k, v))
        q, k = rms_norm(q, self.norm_q), rms_norm(k, self.norm_k)
        q = turned(q, *angles[:2]) if self.last else joint_turned(q, tokens, angles)
        k = joint_turned(k, tokens, angles)
        mixed = join_heads(attend(q, k, v)).reshape(-1, hidden)
        both = torch.cat([mixed, self.activation(inner)], dim=-1)
        return self.proj(both).reshape(batch, -1, hidden)


def joint_turned(x: Tensor, tokens: int, angles: Sequence[Tensor]) -> Tensor:
    """Turn x (B, heads, L + T, head width), whose first L tokens are those of the text.

    ``angles`` are cos and sin, then text_cos and text_sin unless all positions of the text are 0.
    """
    cos, sin, *of_text = angles
    text = turned(x[:, :, :tokens], *of_text) if of_text else x[:, :, :tokens]
    return torch.cat([text, turned(x[:, :, tokens:], cos, sin)], dim=2)


def swiglu(x: Tensor) -> Tensor:
    """(..., 2 * inner) to (..., inner): the first half, through SiLU, times the second.

    Source: Shazeer, "GLU Variants Improve Transformer", 2020, equation 6.
    """
    first, second = x.chunk(2, dim=-1)
    return F.silu(first) * second


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
