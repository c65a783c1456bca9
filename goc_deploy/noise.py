"""Noise that depends on (seed, image index) alone: not on batch size, backend, worker or machine."""

from __future__ import annotations

import numpy as np

from goc_deploy.errors import UsageError


def image_noise(seed: int, image: int, draws: int, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal noise of one image from a counter-based generator.

    Args:
        seed: 0 .. 2**64 - 1.
        image: index of the image, from 0.
        draws: number of tensors: the first is x_T, the others are for stochastic samplers.
        shape: of one tensor, (C, H, W).

    Returns:
        (draws, C, H, W) float32.

    Raises:
        UsageError: the seed is out of range.
    """
    if not 0 <= seed < 2**64:
        raise UsageError(f"seed must be within 0..2**64-1, got {seed}")
    generator = np.random.Generator(np.random.Philox(key=[seed, image]))
    return generator.standard_normal((draws, *shape), dtype=np.float32)
