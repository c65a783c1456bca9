"""The embedding and the final layer of models whose samples have any size.

Latents and model outputs are seen by patches, (N, C, ..., h, p, w, p), and tokens along their axes,
(B, ..., h, w, D). These are the same numbers in the same order as (N, C, ..., H, W) and (B, T, D),
and no graph has to divide a size by the size of a patch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from goc_deploy.exporters.architectures.dit_model import modulate
from goc_deploy.exporters.tracing import Examples
from goc_deploy.exporters.units import Input
from goc_deploy.spec import ModelSpec

AXES = ("token_rows", "token_columns")  # names of the dynamic dimensions
VIDEO_AXES = ("token_frames", *AXES)
EXAMPLE_GRID = (2, 3, 4)  # tokens along each axis of example inputs


class Patches(nn.Module):
    """`PatchEmbed` as one matrix product on latents that are seen by patches.

    Args:
        spec: sizes of the model.
        bias: whether the layer has a bias.
        channels_last: whether the values of a patch are (p, p, C) rather than (C, p, p).
    """

    def __init__(self, spec: ModelSpec, *, bias: bool = True, channels_last: bool = False) -> None:
        super().__init__()
        self.channels_last = channels_last
        self.proj = nn.Linear(spec.channels * spec.patch**2, spec.hidden, bias=bias)

    def forward(self, latents: Tensor) -> Tensor:
        """Latents (N, C, ..., h, p, w, p) float32 to tokens (N, ..., h, w, D)."""
        last = latents.ndim - 1
        axes = [0, *range(2, last - 3), last - 3, last - 1]
        of_patch = (last - 2, last, 1) if self.channels_last else (1, last - 2, last)
        values = latents.permute(*axes, *of_patch)
        tokens = self.proj(values.flatten(-3).flatten(0, -2).to(self.proj.weight.dtype))
        return tokens.reshape(*values.shape[: len(axes)], -1)


class EmbedUnit(nn.Module):
    """Latents to tokens, computed once per image and then copied to the rows of the batch."""

    def __init__(self, spec: ModelSpec, *, bias: bool = True, channels_last: bool = False) -> None:
        super().__init__()
        self.x_embedder = Patches(spec, bias=bias, channels_last=channels_last)

    def forward(self, latents: Tensor, rows: Tensor, positions: Tensor | None = None) -> Tensor:
        """Latents to tokens (B, ..., h, w, D).

        Args:
            latents: (N, C, ..., h, p, w, p) float32.
            rows: (B,) int64, the image of each row.
            positions: (h, w, D) float32, or None if the blocks read positions.
        """
        tokens = self.x_embedder(latents)  # (N, ..., h, w, D)
        if positions is not None:
            tokens = (tokens.float() + positions).to(tokens.dtype)
        return tokens.index_select(0, rows)


class FinalUnit(nn.Module):
    """Tokens to the model output."""

    def __init__(self, spec: ModelSpec, *, bias: bool = True) -> None:
        super().__init__()
        self.patch, self.channels = spec.patch, spec.output_channels
        self.linear = nn.Linear(spec.hidden, spec.patch**2 * spec.output_channels, bias=bias)

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """Tokens (B, ..., h, w, D) and modulation (B, D) to the output by patches, float32."""
        batch, *axes, hidden = x.shape
        modulated = modulate(x.flatten(1, -2), shift, scale)
        patches = self.linear(modulated.reshape(-1, hidden))  # (B*T, p*p*C_out)
        whole = patches.reshape(batch, *axes, self.patch, self.patch, self.channels)
        height = len(axes) - 1  # of the tokens; after them come the two sides of a patch
        order = (0, height + 4, *range(1, height), height, height + 2, height + 1, height + 3)
        return whole.permute(order).float()


def example_axes(spec: ModelSpec) -> tuple[int, ...]:
    """Tokens along each axis of the example inputs: few, and all different."""
    return EXAMPLE_GRID[-len(spec.axes) :]


def latents_example(spec: ModelSpec, examples: Examples) -> Input:
    """``latents`` (N, C, ..., h, p, w, p) float32."""
    small = spec.at(example_axes(spec))
    shape = small.in_patches((2, *small.latents))
    *frames, rows, columns = _names(spec)
    places = [*range(2, 2 + len(frames)), len(shape) - 4, len(shape) - 2]
    dynamic = dict(zip(places, (*frames, rows, columns), strict=True))
    return Input("latents", examples.normal(*shape, dtype=torch.float32), {0: "images", **dynamic})


def grid_example(spec: ModelSpec, examples: Examples) -> Input:
    """``x``: tokens along their axes, (B, ..., h, w, D)."""
    dynamic = dict(enumerate(_names(spec), 1))
    tokens = examples.normal(2, *example_axes(spec), spec.hidden)
    return Input("x", tokens, {0: "batch", **dynamic})


def table_example(spec: ModelSpec, examples: Examples) -> Input:
    """``positions`` (h, w, D) float32."""
    table = examples.normal(*example_axes(spec), spec.hidden, dtype=torch.float32)
    return Input("positions", table, dict(enumerate(_names(spec))))


def _names(spec: ModelSpec) -> tuple[str, ...]:
    return VIDEO_AXES if spec.video else AXES
