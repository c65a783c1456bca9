"""The tensors that tell graphs the size of a sample, computed on the host."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from goc_deploy.spec import ModelSpec


def size_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor, by the name of the input that reads it.

    ``positions`` (rows, columns, D) are added to the tokens. ``cos`` and ``sin`` (T, head width /
    2) turn pairs of values of queries and keys. ``told_size`` (2,) is height and width in pixels.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    if spec.told_size and spec.any_size:
        shapes["told_size"] = (2,)
    if spec.positions is None:
        return shapes
    if spec.positions.kind == "sine":
        return {**shapes, "positions": (*spec.axes, spec.hidden)}
    angles = (spec.tokens, sum(spec.positions.widths) // 2)
    return {**shapes, "cos": angles, "sin": angles}


def size_tensors(spec: ModelSpec) -> dict[str, np.ndarray]:
    """The tensors of `size_shapes`, float32."""
    tensors: dict[str, np.ndarray] = {}
    positions = spec.positions
    if positions is None:
        return tensors
    if spec.told_size and spec.any_size:
        trained = positions.base * spec.patch  # side of the latents of ``told_size`` pixels
        tensors["told_size"] = np.array(spec.sample[-2:]) * (spec.told_size / trained)
    if positions.kind == "sine":
        rows, columns = spec.axes
        base, stretch = positions.base, positions.stretch
        tensors["positions"] = sine_table(spec.hidden, rows, columns, base, stretch)
    else:
        angles = rotary_angles(spec.axes, positions.widths, positions.theta)
        tensors |= {"cos": np.cos(angles), "sin": np.sin(angles)}
    return {name: values.astype(np.float32) for name, values in tensors.items()}


def sine_table(hidden: int, rows: int, columns: int, base: int, stretch: float) -> np.ndarray:
    """Sines and cosines of the column of each token, then of its row.

    Args:
        hidden: D.
        rows: tokens from top to bottom.
        columns: tokens from left to right.
        base: number of tokens that are ``1 / stretch`` apart. If there are more or fewer, they are
            closer or farther apart, as in diffusers' ``get_2d_sincos_pos_embed``.
        stretch: number of tokens within a distance of 1.

    Returns:
        (rows, columns, hidden) float32.

    Source: Vaswani et al., "Attention Is All You Need", NeurIPS 2017, section 3.5, in two
    dimensions.
    """
    frequencies = 10_000.0 ** (-np.arange(hidden // 4) / (hidden // 4))

    def axis(count: int) -> np.ndarray:
        angles = np.arange(count)[:, None] * (base / count / stretch) * frequencies
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)  # (count, hidden / 2)

    shape = (rows, columns, hidden // 2)
    of_column, of_row = axis(columns)[None], axis(rows)[:, None]
    table = [np.broadcast_to(of_column, shape), np.broadcast_to(of_row, shape)]
    return np.concatenate(table, axis=2).astype(np.float32)


def rotary_angles(axes: Sequence[int], widths: Sequence[int], theta: float) -> np.ndarray:
    """The angle of each pair of values of a head, for every token.

    Pair j of an axis of width d turns by ``position * theta ** (-2 j / d)``.

    Args:
        axes: tokens along each axis.
        widths: values of a head that each axis turns. If there are more of them than axes, the
            first ones belong to axes along which every token has position 0.
        theta: base of the frequencies.

    Returns:
        (T, sum of widths / 2) float64.

    Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021,
    section 3.2.2, with one group of values per axis.
    """
    axes = (*[1] * (len(widths) - len(axes)), *axes)
    parts = []
    for i, (count, width) in enumerate(zip(axes, widths, strict=True)):
        frequencies = theta ** (-np.arange(0, width, 2) / width)
        angles = np.arange(count)[:, None] * frequencies  # (count, width / 2)
        spread = [1] * len(axes)
        spread[i] = count
        whole = np.broadcast_to(angles.reshape(*spread, -1), (*axes, width // 2))
        parts.append(whole.reshape(-1, width // 2))
    return np.concatenate(parts, axis=1)
