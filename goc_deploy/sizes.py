"""Sizes of images and videos in pixels, and of their latents."""

from __future__ import annotations

from typing import Any

from goc_deploy.errors import UsageError
from goc_deploy.spec import LONGEST_SIDE, ModelSpec


def latent_shape(size: Any, frames: Any, spec: ModelSpec, pixels: int) -> tuple[int, ...]:
    """The shape of the latents of a sample, (C, H, W), or (C, F, H, W) of a video.

    Args:
        size: width and height in pixels, or None for those of ``spec``.
        frames: number of frames of a video, or None for that of ``spec``.
        spec: sizes of the model.
        pixels: pixels per latent pixel and side.

    Raises:
        UsageError: the size is not possible with this model, or too large for the engines.
    """
    grid = grid_from_size(size, frames, spec, pixels)
    if grid == spec.axes:
        return spec.latents
    most = spec.largest
    if spec.max_grid is None:
        raise UsageError(
            f"the engine directory draws {in_words(spec, pixels)} only; export it with `max_size` "
            "for other sizes"
        )
    asked = spec.at(grid)
    sides = zip(asked.axes[-2:], most.axes[-2:], strict=True)
    if (
        asked.tokens > most.tokens
        or asked.axes[:-2] > most.axes[:-2]
        or any(side > LONGEST_SIDE * limit for side, limit in sides)
    ):
        raise UsageError(
            f"{in_words(asked, pixels)} is more than the engine directory accepts: as many pixels "
            f"as {in_words(most, pixels)}, and {LONGEST_SIDE} times a side of it; choose a smaller "
            "size, or export with a larger `max_size`"
        )
    return asked.latents


def grid_from_size(size: Any, frames: Any, spec: ModelSpec, pixels: int) -> tuple[int, ...]:
    """Tokens along each axis of a sample; the arguments are those of `latent_shape`.

    Raises:
        UsageError: the model cannot draw such a sample.
    """
    unit = spec.patch * pixels
    *own_frames, rows, columns = spec.axes
    if size is not None:
        if not _are_whole(size, 2) or any(side < 1 or side % unit for side in size):
            raise UsageError(
                f"`size` must be a width and a height that {unit} divides, got {size!r:.60}"
            )
        columns, rows = (side // unit for side in size)
        if rows * columns % spec.token_multiple:
            raise UsageError(
                f"`size` must be of a multiple of {spec.token_multiple} patches of {unit}x{unit} "
                f"pixels, got {size!r:.60}, of which there are {rows * columns}"
            )
    most = spec.positions.table if spec.positions is not None else 0
    if most and max(rows, columns) > most:
        raise UsageError(
            f"`size` must be at most {most * unit} per side, got {size!r:.60}; the model has no "
            "positions beyond"
        )
    if frames is None:
        return (*own_frames, rows, columns)
    if not own_frames:
        raise UsageError("`frames` is for models of videos; this model draws images")
    group = spec.vae_frames
    if not _are_whole((frames,), 1) or frames < 1 or (frames - 1) % group:
        raise UsageError(
            f"`frames` must be one more than a multiple of {group}, such as {4 * group + 1}, got "
            f"{frames!r:.60}"
        )
    return (1 + (frames - 1) // group, rows, columns)


def in_words(spec: ModelSpec, pixels: int) -> str:
    """The size of a sample in pixels, such as ``1024x768``, with the frames of a video."""
    *frames, height, width = spec.sample
    whole = f"{width * pixels}x{height * pixels}"
    return f"{1 + (frames[0] - 1) * spec.vae_frames} frames of {whole}" if frames else whole


def _are_whole(values: Any, count: int) -> bool:
    return (
        isinstance(values, tuple | list)
        and len(values) == count
        and all(isinstance(value, int) and not isinstance(value, bool) for value in values)
    )
