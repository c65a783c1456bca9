"""Latents to pictures, and pictures to files."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from PIL import Image

from goc_deploy.manifest import IMAGE_CHANNELS
from goc_deploy.outputs import written
from goc_deploy.publish import disk_errors


def images_from_latents(latents: np.ndarray) -> np.ndarray | None:
    """Pixel-space samples to pictures.

    Args:
        latents: (N, C, H, W) float32, pixels in -1..1.

    Returns:
        (N, H, W, C) uint8, ``clamp(127.5 * x + 128)`` as DiT's reference does, or None where C is not 1 or 3.
    """
    return pixels_to_uint8(latents) if latents.shape[1] in IMAGE_CHANNELS else None


def pixels_to_uint8(pixels: np.ndarray) -> np.ndarray:
    """(..., C, H, W) float32 in -1..1 to (..., H, W, C) uint8."""
    return np.moveaxis(np.clip(127.5 * pixels + 128, 0, 255).astype(np.uint8), -3, -1)


def grid(images: np.ndarray, columns: int | None = None, *, scale: int = 1, gap: int = 2) -> Image.Image:
    """Arrange pictures in rows.

    Args:
        images: (N, H, W, C) uint8, C is 1 or 3.
        columns: per row; default: as square as possible.
        scale: whole-number magnification.
        gap: pixels between pictures.
    """
    count, height, width, _ = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    canvas = np.full(
        (rows * (height * scale + gap) - gap, columns * (width * scale + gap) - gap, images.shape[3]), 255, np.uint8
    )
    for i, image in enumerate(images):
        y, x = (i // columns) * (height * scale + gap), (i % columns) * (width * scale + gap)
        canvas[y : y + height * scale, x : x + width * scale] = image.repeat(scale, 0).repeat(scale, 1)
    return _image(canvas)


def pil_images(images: np.ndarray) -> list[Image.Image]:
    """Pictures as Pillow has them.

    Args:
        images: (N, H, W, C) uint8, C is 1 or 3.

    Returns:
        N pictures, mode ``L`` where C is 1, else ``RGB``.
    """
    return [_image(image) for image in images]


def _image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def save_images(images: np.ndarray, output: Path, columns: int | None = None) -> list[Path]:
    """Write pictures: ``.png`` is a grid, ``.npz`` the ADM evaluation format, anything else a directory of PNGs.

    ``columns`` is for the grid; by default it is as square as possible.
    ADM format: ``arr_0`` uint8 (N, H, W, 3); grey pictures are repeated over three channels.

    Returns:
        The files written.

    Raises:
        ConflictError, ResourceError: the system refuses to write.
    """
    if output.suffix == ".png":
        scale = max(1, 112 // images.shape[1])
        with written(output) as temporary:
            grid(images, columns, scale=scale, gap=2 * scale).save(temporary)
        return [output]
    if output.suffix == ".npz":
        with written(output) as temporary:
            np.savez(temporary, arr_0=np.broadcast_to(images, (*images.shape[:3], 3)))
        return [output]
    with disk_errors(f"writing {output}"):
        output.mkdir(parents=True, exist_ok=True)
    digits = max(4, len(str(len(images) - 1)))
    paths = [output / f"{i:0{digits}d}.png" for i in range(len(images))]
    for image, path in zip(images, paths, strict=True):
        with written(path) as temporary:
            _image(image).save(temporary)
    return paths
