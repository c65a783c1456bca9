"""Noise that depends only on seed and image index: not on batch size, backend or machine."""

from __future__ import annotations

import numpy as np

from goc_deploy.errors import UsageError


def check_key(seed: int, image: int) -> None:
    """Check that a seed and the index of an image are in range.

    Raises:
        UsageError: one of them is not within 0 .. 2**64 - 1.
    """
    for name, word in (("seed", seed), ("the index of an image", image)):
        if not 0 <= word < 2**64:
            raise UsageError(f"{name} must be within 0..2**64-1, got {word}")


def image_noise(seed: int, image: int, draws: int, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal noise of one image from a counter-based generator.

    Args:
        seed: 0 .. 2**64 - 1.
        image: index of the image, 0 .. 2**64 - 1.
        draws: number of tensors; the first is x_T, the others are for stochastic samplers.
        shape: shape of one tensor, (C, H, W).

    Returns:
        (draws, C, H, W) float32.

    Raises:
        UsageError: the seed or the index is out of range.
    """
    check_key(seed, image)
    key = np.array(
        [seed, image], np.uint64
    )  # NumPy would convert a list of 64-bit words to float64
    generator = np.random.Generator(np.random.Philox(key=key))
    return generator.standard_normal((draws, *shape), dtype=np.float32)
