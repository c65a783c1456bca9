"""The tensors that tell graphs the size of a sample, computed on the host."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np

from goc_deploy.spec import ModelSpec, Positions


def size_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor, by the name of the input that reads it.

    ``positions`` (rows, columns, D) are added to the tokens. ``cos`` and ``sin`` (T, head width /
    2) turn pairs of values of queries and keys, ``text_cos`` and ``text_sin`` (Lc, head width / 2)
    those of tokens of the text, and ``reference_cos`` and ``reference_sin`` (R, head width / 2)
    those of tokens of reference images. ``told_size`` (2,) is height and width in pixels.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    if spec.told_size and spec.any_size:
        shapes["told_size"] = (2,)
    if spec.positions is None:
        return shapes
    if spec.positions.kind == "sine":
        return {**shapes, "positions": (*spec.axes, spec.hidden)}
    pairs = sum(spec.positions.widths) // 2
    shapes |= dict.fromkeys(("cos", "sin"), (spec.tokens, pairs))
    if spec.positions.turns_text:
        shapes |= dict.fromkeys(("text_cos", "text_sin"), (spec.caption_tokens, pairs))
    if spec.max_references:
        of_references = (spec.tokens_of("reference"), pairs)
        shapes |= dict.fromkeys(("reference_cos", "reference_sin"), of_references)
    return shapes


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
        tensors["positions"] = _added_positions(spec, positions)
    else:
        places = _places(spec.axes, centered=positions.centered)
        if positions.text_axis:
            places.append(np.zeros(1, int))
        angles = rotary_angles(places, positions.widths, positions.theta)
        tensors |= {"cos": np.cos(angles), "sin": np.sin(angles)}
        others = [_places(axes, centered=positions.centered) for axes in spec.reference_axes]
        if positions.turns_text:
            along = _text_angles(spec, positions, [*places, *chain.from_iterable(others)])
            tensors |= {"text_cos": np.cos(along), "text_sin": np.sin(along)}
        if others:
            turns = _reference_angles(positions, others)
            tensors |= {"reference_cos": np.cos(turns), "reference_sin": np.sin(turns)}
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
    rows_at, columns_at = (np.arange(count) * (base / count / stretch) for count in (rows, columns))
    return _joined(sines(columns_at, hidden // 2), sines(rows_at, hidden // 2))


def sines(places: np.ndarray, width: int) -> np.ndarray:
    """Sines of places on an axis, then cosines.

    Args:
        places: (count,) positions.
        width: number of values for each place; even.

    Returns:
        (count, width) float64.
    """
    frequencies = 10_000.0 ** (-np.arange(width // 2) / (width // 2))
    angles = places[:, None] * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def places_in_table(count: int, positions: Positions) -> np.ndarray:
    """The positions of the middle tokens along a side of a table, (count,) float64."""
    first = (positions.table - count) // 2
    return positions.origin + np.arange(first, first + count) / positions.stretch


def _added_positions(spec: ModelSpec, positions: Positions) -> np.ndarray:
    """The table that is added to the tokens of a sample, (rows, columns, D)."""
    rows, columns = spec.axes
    if not positions.table:
        return sine_table(spec.hidden, rows, columns, positions.base, positions.stretch)
    of_rows, of_columns = (
        sines(places_in_table(count, positions), spec.hidden // 2) for count in (rows, columns)
    )
    return _joined(of_columns, of_rows)


def _joined(of_columns: np.ndarray, of_rows: np.ndarray) -> np.ndarray:
    """The values of a token's column, (columns, D / 2), then of its row, (rows, D / 2); float32."""
    shape = (len(of_rows), len(of_columns), of_columns.shape[1])
    of_rows, of_columns = of_rows.astype(np.float32), of_columns.astype(np.float32)
    table = [np.broadcast_to(of_columns[None], shape), np.broadcast_to(of_rows[:, None], shape)]
    return np.concatenate(table, axis=2)


def rotary_angles(places: Sequence[np.ndarray], widths: Sequence[int], theta: float) -> np.ndarray:
    """The angle of each pair of values of a head, for every token.

    Pair j of an axis of width d turns by ``position * theta ** (-2 j / d)``.

    Args:
        places: the positions along each axis. Leading axes may be left out; their position is 0.
        widths: values of a head that each axis turns.
        theta: base of the frequencies.

    Returns:
        (T, sum of widths / 2) float64.

    Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021,
    section 3.2.2, with one group of values per axis.
    """
    absent = [np.zeros(1)] * (len(widths) - len(places))
    grid = np.meshgrid(*absent, *places, indexing="ij")  # a position of every token, per axis
    turns = np.stack([axis.ravel() for axis in grid], axis=1).astype(np.float64)  # (T, axes)
    angles = np.repeat(turns, [width // 2 for width in widths], axis=1)
    angles *= _frequencies(widths, theta)
    return angles


def _text_angles(spec: ModelSpec, positions: Positions, places: Sequence[np.ndarray]) -> np.ndarray:
    """The angles of the tokens of the text, (L, sum of widths / 2) float64."""
    counted = np.arange(spec.caption_tokens)
    if positions.text_axis:
        return rotary_angles([counted], positions.widths, positions.theta)
    behind = max(int(axis[-1]) for axis in places) + 1
    angles: np.ndarray = (behind + counted)[:, None] * _frequencies(
        positions.widths, positions.theta
    )
    return angles


def _reference_angles(
    positions: Positions, references: Sequence[Sequence[np.ndarray]]
) -> np.ndarray:
    """The angles of the tokens of reference images, (R, sum of widths / 2) float64.

    On the first axis, where the sample is at 0, they are at 1, 2, and so on.

    Args:
        positions: the positions of the model.
        references: the positions of each reference image along the other axes.
    """
    of_images = [
        rotary_angles([np.array([i]), *places], positions.widths, positions.theta)
        for i, places in enumerate(references, 1)
    ]
    return np.concatenate(of_images)


def _frequencies(widths: Sequence[int], theta: float) -> np.ndarray:
    """The angle of each pair of values of a head for one position: (sum of widths / 2,)."""
    return np.concatenate([theta ** (-np.arange(0, width, 2) / width) for width in widths])


def _places(axes: Sequence[int], *, centered: bool) -> list[np.ndarray]:
    """The positions along each axis, from 0, or rows and columns from the middle."""
    first = [0] * (len(axes) - 2)
    first += [axis // 2 - axis if centered else 0 for axis in axes[-2:]]
    return [np.arange(count) + start for count, start in zip(axes, first, strict=True)]
