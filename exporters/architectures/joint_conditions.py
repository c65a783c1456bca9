"""What models with two streams compute once per request: modulation, and tokens of captions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from goc_deploy.exporters.architectures.dit_model import TIMESTEP_FREQUENCIES, timestep_features
from goc_deploy.exporters.architectures.wan import rms_norm
from goc_deploy.spec import ModelSpec

GUIDANCE_SCALE = 1000.0  # the guidance scale is embedded like a time of 1000 times its value


class Embedder(nn.Module):
    """Two linear layers with SiLU between them."""

    def __init__(self, read: int, width: int, *, bias: bool = True) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(read, width, bias=bias)
        self.linear_2 = nn.Linear(width, width, bias=bias)

    def forward(self, values: Tensor) -> Tensor:
        """(n, values) float32 to (n, D)."""
        return self.linear_2(F.silu(self.linear_1(values.to(self.linear_1.weight.dtype))))


class ConditioningUnit(nn.Module):
    """Timesteps, and what else a model reads, to the modulation table.

    Args:
        spec: sizes of the model. It shows whether pooled captions and a guidance scale are read.
        places: for each row of the table, its place among those that are computed. A row that
            units share is computed once.
        bias: whether layers have biases.
    """

    def __init__(self, spec: ModelSpec, places: Sequence[int], *, bias: bool = True) -> None:
        super().__init__()
        self.places = list(places)
        self.timestep_embedder = Embedder(TIMESTEP_FREQUENCIES, spec.hidden, bias=bias)
        if spec.pooled_channels:
            self.text_embedder = Embedder(spec.pooled_channels, spec.hidden, bias=bias)
        if spec.embedded_guidance:
            self.guidance_embedder = Embedder(TIMESTEP_FREQUENCIES, spec.hidden, bias=bias)
        self.names = conditions_of(spec)
        self.modulation = nn.Linear(spec.hidden, (max(places) + 1) * spec.hidden, bias=bias)

    def forward(self, t: Tensor, *given: Tensor) -> Tensor:
        """Everything that the modulation depends on to the table (S, M, K or 1, D).

        Args:
            t: (S,) timesteps, from 1000 to 0.
            given: pooled captions (K, P) float32 and the guidance scale (1,) float32, of the models
                that read them.
        """
        inputs = dict(zip(self.names, given, strict=True))
        condition = self.timestep_embedder(timestep_features(t)).unsqueeze(1)  # (S, 1, D)
        if "guidance" in inputs:
            scale = timestep_features(GUIDANCE_SCALE * inputs["guidance"])
            condition = condition + self.guidance_embedder(scale)
        if "pooled" in inputs:
            condition = condition + self.text_embedder(inputs["pooled"])  # (S, K, D)
        steps, captions, hidden = condition.shape
        rows = self.modulation(F.silu(condition).reshape(-1, hidden))
        rows = rows.reshape(steps, captions, -1, hidden)
        if self.places != list(range(len(self.places))):
            rows = rows.index_select(2, torch.tensor(self.places))
        return rows.transpose(1, 2)


def conditions_of(spec: ModelSpec) -> tuple[str, ...]:
    """The inputs of the conditioning, after the timesteps."""
    return ("pooled",) * bool(spec.pooled_channels) + ("guidance",) * spec.embedded_guidance


class CaptionsUnit(nn.Module):
    """Captions to the text tokens with which every step starts.

    Args:
        spec: sizes of the model.
        bias: whether the layer has a bias.
        normed: whether the embeddings are normalised before it.
    """

    def __init__(self, spec: ModelSpec, *, bias: bool = True, normed: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(spec.caption_channels, spec.hidden, bias=bias)
        if normed:
            self.norm = nn.Parameter(torch.empty(spec.caption_channels))

    def forward(self, captions: Tensor, caption_rows: Tensor) -> Tensor:
        """Captions (K, L, C) float32 and the caption (B,) of each row to tokens (B, L, D)."""
        count, tokens, width = captions.shape
        narrow = captions.to(self.linear.weight.dtype)
        if hasattr(self, "norm"):
            narrow = rms_norm(narrow, self.norm)
        projected = self.linear(narrow.reshape(-1, width))
        return projected.reshape(count, tokens, -1).index_select(0, caption_rows)
