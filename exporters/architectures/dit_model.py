"""Diffusion Transformer (DiT) in PyTorch, in the public checkpoint layout.

The parameter names and shapes follow the public DiT checkpoints, so ``load_state_dict`` accepts
them unchanged. Exported graphs are compared with this module, and the examples train it.

Source: Peebles and Xie, "Scalable Diffusion Models with Transformers", ICCV 2023, figure 3
(adaLN-Zero block).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from goc_deploy.spec import ModelSpec

LAYER_NORM_EPSILON = 1e-6
TIMESTEP_FREQUENCIES = 256
TIMESTEP_MAX_PERIOD = 10_000


def normalize(x: Tensor, epsilon: float = LAYER_NORM_EPSILON) -> Tensor:
    """Layer norm over the last dimension without affine parameters: (..., D) to float32."""
    return F.layer_norm(x.float(), (x.shape[-1],), eps=epsilon)


def modulate(
    x: Tensor, shift: Tensor, scale: Tensor, epsilon: float = LAYER_NORM_EPSILON
) -> Tensor:
    """Normalize tokens, then shift and scale them per sample (adaLN).

    Args:
        x: (B, T, D).
        shift: (B, D).
        scale: (B, D).
        epsilon: added to the variance.

    Returns:
        (B, T, D) in the dtype of ``x``; the arithmetic is float32.
    """
    scaled = normalize(x, epsilon) * (1 + scale.float().unsqueeze(1)) + shift.float().unsqueeze(1)
    return scaled.to(x.dtype)


def timestep_features(t: Tensor, frequency_shift: int = 0) -> Tensor:
    """Sinusoidal features of timesteps, cosines first.

    Args:
        t: (S,) float32, in training timesteps (0..999).
        frequency_shift: see `goc_deploy.spec.ModelSpec`.

    Returns:
        (S, 256) float32.
    """
    half = TIMESTEP_FREQUENCIES // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t.device) / (half - frequency_shift)
    angles = t[:, None].float() * torch.exp(-math.log(TIMESTEP_MAX_PERIOD) * exponents)[None]
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


class Attention(nn.Module):
    """Multi-head self-attention with a fused qkv projection."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.proj = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, T, D) to tokens (B, T, D)."""
        batch, tokens, hidden = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, hidden // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, T, head_dim)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, hidden))  # (B, T, D)


class Mlp(nn.Module):
    """Two linear layers with tanh-approximated GELU between them."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden, inner)
        self.fc2 = nn.Linear(inner, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def adaln(hidden: int, chunks: int) -> nn.Sequential:
    """SiLU and a linear layer: the condition (..., D) to ``chunks`` joined modulation vectors."""
    return nn.Sequential(nn.SiLU(), nn.Linear(hidden, chunks * hidden))


class Block(nn.Module):
    """adaLN-Zero block: gated attention, then gated MLP."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.attn = Attention(spec.hidden, spec.heads)
        self.mlp = Mlp(spec.hidden, spec.mlp_hidden)
        self.adaLN_modulation = adaln(spec.hidden, 6)
        self.mlp_norm_eps = spec.mlp_norm_eps
        if spec.block_embedders:
            self.t_embedder, self.y_embedder = TimestepEmbed(spec), LabelEmbed(spec)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Tokens (B, T, D) and conditions (B, D) to tokens (B, T, D)."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(condition).chunk(
            6, dim=1
        )
        x = x + gate_a.unsqueeze(1) * self.attn(modulate(x, shift_a, scale_a))
        return x + gate_m.unsqueeze(1) * self.mlp(modulate(x, shift_m, scale_m, self.mlp_norm_eps))


class PatchEmbed(nn.Module):
    """Non-overlapping patches to tokens."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.proj = nn.Conv2d(spec.channels, spec.hidden, kernel_size=spec.patch, stride=spec.patch)

    def forward(self, x: Tensor) -> Tensor:
        """Latents (B, C, H, W) to tokens (B, T, D)."""
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbed(nn.Module):
    """Timesteps to condition vectors."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.frequency_shift = spec.frequency_shift
        self.mlp = nn.Sequential(
            nn.Linear(TIMESTEP_FREQUENCIES, spec.hidden),
            nn.SiLU(),
            nn.Linear(spec.hidden, spec.hidden),
        )

    def forward(self, t: Tensor) -> Tensor:
        """Timesteps (S,) to conditions (S, D)."""
        return self.mlp(
            timestep_features(t, self.frequency_shift).to(next(self.mlp.parameters()).dtype)
        )


class LabelEmbed(nn.Module):
    """Class labels to condition vectors; the last row is the null label."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(spec.choices + 1, spec.hidden)

    def forward(self, labels: Tensor) -> Tensor:
        """Labels (R,) int64 to conditions (R, D)."""
        return self.embedding_table(labels)


class FinalLayer(nn.Module):
    """Last modulation and projection to patches."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.linear = nn.Linear(spec.hidden, spec.patch**2 * spec.output_channels)
        self.adaLN_modulation = adaln(spec.hidden, 2)


def unpatchify(patches: Tensor, spec: ModelSpec) -> Tensor:
    """Token outputs (B, T, p*p*C) to images (B, C, H, W)."""
    (rows, columns), p = spec.axes, spec.patch
    x = patches.reshape(-1, rows, columns, p, p, spec.output_channels)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, *spec.prediction)


class DiT(nn.Module):
    """Class-conditional DiT.

    Raises:
        RuntimeError: ``load_state_dict`` raises it if names or shapes differ from the spec.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.x_embedder = PatchEmbed(spec)
        if not spec.block_embedders:
            self.t_embedder, self.y_embedder = TimestepEmbed(spec), LabelEmbed(spec)
        self.pos_embed = nn.Parameter(torch.zeros(1, spec.tokens, spec.hidden), requires_grad=False)
        self.blocks = nn.ModuleList(Block(spec) for _ in range(spec.depth))
        self.final_layer = FinalLayer(spec)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Predict the noise (and sigma, if learned).

        Args:
            x: (B, C, H, W).
            t: (B,) training timesteps, 0..999.
            labels: (B,) int64; ``spec.classes`` is the null label.

        Returns:
            (B, output_channels, H, W).
        """
        embedders: Iterable[Any] = (
            self.blocks if self.spec.block_embedders else [self] * self.spec.depth
        )
        # (B, D) each
        conditions = [own.t_embedder(t) + own.y_embedder(labels) for own in embedders]
        x = self.x_embedder(x) + self.pos_embed  # (B, T, D)
        for block, condition in zip(self.blocks, conditions, strict=True):
            x = block(x, condition)
        shift, scale = self.final_layer.adaLN_modulation(conditions[0]).chunk(2, dim=1)
        return unpatchify(self.final_layer.linear(modulate(x, shift, scale)), self.spec)
