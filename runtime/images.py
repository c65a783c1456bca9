"""Latents to images."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from goc_deploy.engine_dir.manifest import IMAGE_CHANNELS


def images_from_latents(latents: np.ndarray) -> np.ndarray | None:
    """Convert pixel-space samples to images.

    Args:
        latents: (N, C, H, W) float32, pixels in -1..1, or (N, C, F, H, W) of videos.

    Returns:
        (N, H, W, C) uint8, or (N, F, H, W, C) of videos, ``clamp(127.5 * x + 128)`` as in DiT's
        reference, or None if C is neither 1 nor 3.
    """
    if latents.shape[1] not in IMAGE_CHANNELS:
        return None
    return pixels_to_uint8(np.moveaxis(latents, 1, -3))


def pixels_to_uint8(pixels: np.ndarray) -> np.ndarray:
    """Convert pixels (..., C, H, W) float32 in -1..1 to (..., H, W, C) uint8."""
    return np.moveaxis(np.clip(127.5 * pixels + 128, 0, 255).astype(np.uint8), -3, -1)


def grid(
    images: np.ndarray, columns: int | None = None, *, scale: int = 1, gap: int = 2
) -> Image.Image:
    """Arrange images in rows.

    Args:
        images: (N, H, W, C) uint8, C is 1 or 3.
        columns: images per row; by default, the grid is as square as possible.
        scale: integer magnification.
        gap: pixels between images.
    """
    count, height, width, _ = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    canvas = np.full(
        (
            rows * (height * scale + gap) - gap,
            columns * (width * scale + gap) - gap,
            images.shape[3],
        ),
        255,
        np.uint8,
    )
    for i, image in enumerate(images):
        y, x = (i // columns) * (height * scale + gap), (i % columns) * (width * scale + gap)
        canvas[y : y + height * scale, x : x + width * scale] = image.repeat(scale, 0).repeat(
            scale, 1
        )
    return picture(canvas)


def pil_images(images: np.ndarray) -> list[Image.Image]:
    """Convert images to Pillow images.

    Args:
        images: (N, H, W, C) uint8, C is 1 or 3.

    Returns:
        N images, of mode ``L`` if C is 1, else ``RGB``.
    """
    return [picture(image) for image in images]


def picture(pixels: np.ndarray) -> Image.Image:
    """Convert an image (H, W, 1 or 3) uint8 to a Pillow image."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
