"""Parts of models with a stream of image tokens and one of text tokens (MMDiT).

Source: Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis",
ICML 2024, section 4 and figure 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from goc_deploy.blocks import Blocks, Unit
from goc_deploy.exporters.architectures.dit import scaled_queries
from goc_deploy.exporters.architectures.dit_model import TimestepEmbed
from goc_deploy.exporters.architectures.wan import rms_norm
from goc_deploy.exporters.tracing import Examples
from goc_deploy.exporters.units import Input
from goc_deploy.spec import ModelSpec

CAPTION_ROWS = Input("caption_rows", torch.tensor([1, 0, 1]), {0: "batch"})


def runs_of(blocks: Iterable[tuple[Unit, ...]]) -> tuple[Blocks, ...]:
    """Blocks in order, as runs of equal ones."""
    return tuple(Blocks(len(list(run)), units) for units, run in groupby(blocks))


class Heads(nn.Module):
    """Queries, keys and values of the tokens of a stream.

    Args:
        spec: sizes of the model. With ``qk_norm``, queries and keys are normalised over a head.
        parts: ``qkv``, or ``kv`` if nothing reads the result of these tokens.
    """

    def __init__(self, spec: ModelSpec, parts: str = "qkv") -> None:
        super().__init__()
        self.heads, self.parts = spec.heads, parts
        self.linear = nn.Linear(spec.hidden, len(parts) * spec.hidden)
        if spec.qk_norm:
            for part in parts[:-1]:
                weight = nn.Parameter(torch.empty(spec.hidden // spec.heads))
                self.register_parameter(f"norm_{part}", weight)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Tokens (B, T, D) to (B, heads, T, head width), by the letters of ``parts``."""
        batch, tokens, hidden = x.shape
        joined = self.linear(x.reshape(-1, hidden))  # (B*T, parts * D)
        shape = (batch, tokens, self.heads, hidden // self.heads)
        split = dict(zip(self.parts, joined.chunk(len(self.parts), dim=-1), strict=True))
        return {part: self._placed(part, values.reshape(shape)) for part, values in split.items()}

    def _placed(self, part: str, values: Tensor) -> Tensor:
        """(B, T, heads, head width) to (B, heads, T, head width)."""
        weight = getattr(self, f"norm_{part}", None)
        return (values if weight is None else rms_norm(values, weight)).transpose(1, 2)


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention with scores in the model's precision and a softmax in float32.

    Args:
        q: (B, heads, Q, head width).
        k: (B, heads, K, head width).
        v: (B, heads, K, head width).

    Returns:
        (B, Q, D).
    """
    scores = torch.matmul(scaled_queries(q), k.transpose(-1, -2))  # (B, heads, Q, K)
    weights = torch.softmax(scores.float(), dim=-1).to(q.dtype)
    return torch.matmul(weights, v).transpose(1, 2).flatten(2)


def attend_in_pytorch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same tensor, computed with PyTorch's attention."""
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def joined_attention(
    image: Mapping[str, Tensor], text: Mapping[str, Tensor], how: Attend
) -> tuple[Tensor | None, Tensor]:
    """Attention of both streams over both, in the order text, image.

    Args:
        image: queries, keys and values of the image.
        text: those of the text; without queries, only the image attends.
        how: `attend` or `attend_in_pytorch`.

    Returns:
        The result of the text (B, L, D), or None, and that of the image (B, T, D).
    """
    k, v = (torch.cat([text[part], image[part]], dim=2) for part in "kv")
    if "q" not in text:
        return None, how(image["q"], k, v)
    length = text["q"].shape[2]
    both = how(torch.cat([text["q"], image["q"]], dim=2), k, v)
    return both[:, :length], both[:, length:]


class ConditioningUnit(nn.Module):
    """Timesteps and pooled embeddings of captions to the modulation table."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.rows = spec.modulation.count
        self.t_embedder = TimestepEmbed(spec)
        self.pooled_embedder = nn.Sequential(
            nn.Linear(spec.pooled_channels, spec.hidden),
            nn.SiLU(),
            nn.Linear(spec.hidden, spec.hidden),
        )
        self.modulation = nn.Linear(spec.hidden, self.rows * spec.hidden)

    def forward(self, t: Tensor, pooled: Tensor) -> Tensor:
        """Timesteps (S,) and pooled embeddings (K, P) float32 to the table (S, M, K, D)."""
        of_captions = self.pooled_embedder(pooled.to(self.modulation.weight.dtype))
        condition = self.t_embedder(t).unsqueeze(1) + of_captions.unsqueeze(0)  # (S, K, D)
        steps, captions, hidden = condition.shape
        table = self.modulation(F.silu(condition).reshape(-1, hidden))  # (S*K, M*D)
        return table.reshape(steps, captions, self.rows, hidden).transpose(1, 2)


class CaptionsUnit(nn.Module):
    """Captions to the text tokens with which every step starts."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.linear = nn.Linear(spec.caption_channels, spec.hidden)

    def forward(self, captions: Tensor, caption_rows: Tensor) -> Tensor:
        """Captions (K, L, C) float32 and the caption (B,) of each row to tokens (B, L, D)."""
        count, tokens, width = captions.shape
        projected = self.linear(captions.reshape(-1, width).to(self.linear.weight.dtype))
        return projected.reshape(count, tokens, -1).index_select(0, caption_rows)


def captions_example(spec: ModelSpec, examples: Examples) -> Input:
    """``captions`` (K, L, C) float32."""
    shape = (2, spec.caption_tokens, spec.caption_channels)
    return Input("captions", examples.normal(*shape, dtype=torch.float32), {0: "captions"})


def pooled_example(spec: ModelSpec, examples: Examples) -> Input:
    """``pooled`` (K, P) float32."""
    values = examples.normal(2, spec.pooled_channels, dtype=torch.float32)
    return Input("pooled", values, {0: "captions"})


def text_example(spec: ModelSpec, examples: Examples) -> Input:
    """``text``: tokens (B, L, D)."""
    tokens = examples.normal(2, spec.caption_tokens, spec.hidden)
    return Input("text", tokens, {0: "batch"})
