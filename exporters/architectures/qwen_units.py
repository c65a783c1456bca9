"""The modules of Qwen-Image that are traced."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from goc_deploy.exporters.architectures.dit import add_gated, scaled_queries
from goc_deploy.exporters.architectures.dit_model import Mlp, TimestepEmbed, modulate
from goc_deploy.exporters.architectures.wan import rms_norm, turned
from goc_deploy.spec import ModelSpec

Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # of queries, keys, values and a bias


class ConditioningUnit(nn.Module):
    """Timesteps to the modulation table, the same for every caption."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.rows = spec.modulation.count
        self.t_embedder = TimestepEmbed(spec)
        self.modulation = nn.Linear(spec.hidden, self.rows * spec.hidden)

    def forward(self, t: Tensor) -> Tensor:
        """Timesteps (S,) to the table (S, M, 1, D)."""
        table = self.modulation(F.silu(self.t_embedder(t)))  # (S, M*D)
        return table.reshape(table.shape[0], self.rows, 1, -1)


class CaptionsUnit(nn.Module):
    """Captions to the tokens of the text."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.empty(spec.caption_channels))
        self.txt_in = nn.Linear(spec.caption_channels, spec.hidden)

    def forward(self, captions: Tensor, caption_rows: Tensor) -> Tensor:
        """Captions to tokens (B, Lc, D).

        Args:
            captions: (K, Lc, C) float32.
            caption_rows: (B,) int64, the caption of each row.
        """
        count, tokens, width = captions.shape
        normal = rms_norm(captions.to(self.norm.dtype), self.norm)
        text = self.txt_in(normal.reshape(-1, width)).reshape(count, tokens, -1)
        return text.index_select(0, caption_rows)


class FinalUnit(nn.Module):
    """Tokens to the model output, of which each has its channels first."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.patch, self.channels = spec.patch, spec.channels
        self.linear = nn.Linear(spec.hidden, spec.patch**2 * spec.channels)

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """Tokens (B, h, w, D) and modulation (B, D) to the output (B, C, h, p, w, p) float32."""
        batch, rows, columns, hidden = x.shape
        patches = self.linear(modulate(x.flatten(1, 2), shift, scale).reshape(-1, hidden))
        whole = patches.reshape(batch, rows, columns, self.channels, self.patch, self.patch)
        return whole.permute(0, 3, 1, 4, 2, 5).float()


def _heads(joined: Tensor, parts: int, heads: int, like: Tensor) -> tuple[Tensor, ...]:
    """Products side by side (B*n, parts*D) to heads (B, heads, n, head width), for each part."""
    batch, tokens, hidden = like.shape
    split = joined.reshape(batch, tokens, parts, heads, hidden // heads)
    return split.permute(2, 0, 3, 1, 4).unbind(0)


def _joint_bias(bias: Tensor, caption_rows: Tensor, x: Tensor) -> Tensor:
    """What is added to the scores of the keys [text, image]: (B, 1, 1, Lc + T) float32."""
    of_text = bias.index_select(0, caption_rows)  # (B, Lc)
    return torch.cat([of_text, torch.zeros_like(x[:, :, 0]).float()], dim=1)[:, None, None]


def _attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Attention of heads with a bias, to (B, n, D) for n queries."""
    scores = torch.matmul(scaled_queries(q), k.transpose(-1, -2)).float() + bias
    mixed = torch.matmul(torch.softmax(scores, dim=-1).to(v.dtype), v)  # (B, heads, n, head width)
    return mixed.transpose(1, 2).flatten(2)


def _pytorch_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """The same, computed with PyTorch's attention."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)


class JointAttnUnit(nn.Module):
    """The unit of an attention branch over both streams, in the order text, image."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.heads, head = spec.heads, spec.hidden // spec.heads
        self.qkv, self.qkv_text = (nn.Linear(spec.hidden, 3 * spec.hidden) for _ in range(2))
        self.norm_q, self.norm_k, self.norm_q_text, self.norm_k_text = (
            nn.Parameter(torch.empty(head)) for _ in range(4)
        )
        self.proj, self.proj_text = (nn.Linear(spec.hidden, spec.hidden) for _ in range(2))

    def forward(
        self, x: Tensor, text: Tensor, bias: Tensor, caption_rows: Tensor, *given: Tensor
    ) -> tuple[Tensor, ...]:
        """Both streams to both streams and their features.

        Args:
            x: (B, T, D).
            text: (B, Lc, D).
            bias: (K, Lc) float32, added to the scores of the text.
            caption_rows: (B,) int64, the caption of each row.
            given: cos and sin (T, head width / 2) and text_cos and text_sin (Lc, head width / 2)
                float32; then shift, scale, shift_text, scale_text, gate and gate_text (B, D).

        Returns:
            x_out (B, T, D), text_out (B, Lc, D), feature (B*T, D), feature_text (B*Lc, D).
        """
        return self._with(_attention, x, text, _joint_bias(bias, caption_rows, x), given)

    def reference(
        self, x: Tensor, text: Tensor, bias: Tensor, caption_rows: Tensor, *given: Tensor
    ) -> tuple[Tensor, ...]:
        """The same tensors, computed with PyTorch's attention."""
        return self._with(_pytorch_attention, x, text, _joint_bias(bias, caption_rows, x), given)

    def _with(
        self, attend: Attend, x: Tensor, text: Tensor, bias: Tensor, given: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        cos, sin, text_cos, text_sin, shift, scale, shift_text, scale_text, *gates = given
        hidden, length = x.shape[-1], text.shape[1]
        image = self.qkv(modulate(x, shift, scale).reshape(-1, hidden))
        caption = self.qkv_text(modulate(text, shift_text, scale_text).reshape(-1, hidden))
        q, k, v = _heads(image, 3, self.heads, x)
        q_text, k_text, v_text = _heads(caption, 3, self.heads, text)
        q, k = (
            turned(rms_norm(part, norm), cos, sin)
            for part, norm in ((q, self.norm_q), (k, self.norm_k))
        )
        q_text, k_text = (
            turned(rms_norm(part, norm), text_cos, text_sin)
            for part, norm in ((q_text, self.norm_q_text), (k_text, self.norm_k_text))
        )
        q, k, v = (
            torch.cat(pair, dim=2) for pair in ((q_text, q), (k_text, k), (v_text, v))
        )  # (B, heads, Lc + T, head width) each
        mixed = attend(q, k, v, bias)  # (B, Lc + T, D)
        feature = self.proj(mixed[:, length:].reshape(-1, hidden))
        feature_text = self.proj_text(mixed[:, :length].reshape(-1, hidden))
        return _added(x, text, gates, feature, feature_text)


class LastAttnUnit(nn.Module):
    """The unit of the last attention branch, whose text has keys and values only."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.heads, head = spec.heads, spec.hidden // spec.heads
        self.qkv = nn.Linear(spec.hidden, 3 * spec.hidden)
        self.kv_text = nn.Linear(spec.hidden, 2 * spec.hidden)
        self.norm_q, self.norm_k, self.norm_k_text = (
            nn.Parameter(torch.empty(head)) for _ in range(3)
        )
        self.proj = nn.Linear(spec.hidden, spec.hidden)

    def forward(
        self, x: Tensor, text: Tensor, bias: Tensor, caption_rows: Tensor, *given: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Both streams to x_out (B, T, D) and feature (B*T, D).

        Args:
            x: (B, T, D).
            text: (B, Lc, D).
            bias: (K, Lc) float32, added to the scores of the text.
            caption_rows: (B,) int64, the caption of each row.
            given: as in `JointAttnUnit`, without gate_text.
        """
        return self._with(_attention, x, text, _joint_bias(bias, caption_rows, x), given)

    def reference(
        self, x: Tensor, text: Tensor, bias: Tensor, caption_rows: Tensor, *given: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The same tensors, computed with PyTorch's attention."""
        return self._with(_pytorch_attention, x, text, _joint_bias(bias, caption_rows, x), given)

    def _with(
        self, attend: Attend, x: Tensor, text: Tensor, bias: Tensor, given: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        cos, sin, text_cos, text_sin, shift, scale, shift_text, scale_text, gate = given
        hidden = x.shape[-1]
        image = self.qkv(modulate(x, shift, scale).reshape(-1, hidden))
        caption = self.kv_text(modulate(text, shift_text, scale_text).reshape(-1, hidden))
        q, k, v = _heads(image, 3, self.heads, x)
        k_text, v_text = _heads(caption, 2, self.heads, text)
        q, k = (
            turned(rms_norm(part, norm), cos, sin)
            for part, norm in ((q, self.norm_q), (k, self.norm_k))
        )
        k_text = turned(rms_norm(k_text, self.norm_k_text), text_cos, text_sin)
        mixed = attend(q, torch.cat([k_text, k], dim=2), torch.cat([v_text, v], dim=2), bias)
        feature = self.proj(mixed.reshape(-1, hidden))
        return add_gated(x, gate, feature.reshape(x.shape)), feature


class JointMlpUnit(nn.Module):
    """The unit of an MLP branch of both streams."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.mlp, self.mlp_text = (Mlp(spec.hidden, spec.mlp_hidden) for _ in range(2))

    def forward(self, x: Tensor, text: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
        """Both streams to both streams and their features, as `JointAttnUnit` returns them.

        Args:
            x: (B, T, D).
            text: (B, Lc, D).
            rows: shift, scale, shift_text, scale_text, gate and gate_text (B, D).
        """
        shift, scale, shift_text, scale_text, *gates = rows
        hidden = x.shape[-1]
        feature = self.mlp(modulate(x, shift, scale).reshape(-1, hidden))
        feature_text = self.mlp_text(modulate(text, shift_text, scale_text).reshape(-1, hidden))
        return _added(x, text, gates, feature, feature_text)


def _added(
    x: Tensor, text: Tensor, gates: Sequence[Tensor], feature: Tensor, feature_text: Tensor
) -> tuple[Tensor, ...]:
    """Both streams with their gated features, and the features."""
    gate, gate_text = gates
    return (
        add_gated(x, gate, feature.reshape(x.shape)),
        add_gated(text, gate_text, feature_text.reshape(text.shape)),
        feature,
        feature_text,
    )
