"""How far images are from those that the same noise and labels give without a cache: one number per image."""

from __future__ import annotations

import numpy as np

LEVELS = 255.0
WINDOW, SIGMA = 11, 1.5  # of SSIM
K1, K2 = 0.01, 0.03


def relative_l2(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """``|found - expected| / |expected|`` of every image.

    Args:
        found: (N, ...) floats.
        expected: the same shape, no image all zero.

    Returns:
        (N,) float64.
    """
    difference = (found.astype(np.float64) - expected).reshape(len(found), -1)
    size = expected.astype(np.float64).reshape(len(found), -1)
    return np.asarray(np.linalg.norm(difference, axis=1) / np.linalg.norm(size, axis=1))


def whole_relative_l2(found: np.ndarray, expected: np.ndarray) -> float:
    """``|found - expected| / |expected|`` over everything, in float64; infinite where anything is not finite."""
    difference = float(np.linalg.norm(found.astype(np.float64) - expected))
    error = difference / max(float(np.linalg.norm(expected.astype(np.float64))), 1e-30)
    return error if np.isfinite(error) else float("inf")


def psnr_db(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in decibels, ``10 * log10(255**2 / mean squared error)``.

    Equal images would have an infinite ratio, and with one of them so would the mean; they count as if a single value
    differed by a single level.

    Args:
        found: (N, H, W, C) uint8.
        expected: the same shape.

    Returns:
        (N,) float64.
    """
    squares = np.square(found.astype(np.float64) - expected).reshape(len(found), -1)
    return np.asarray(
        10 * np.log10(LEVELS**2 / np.maximum(squares.mean(axis=1), 1 / squares.shape[1]))
    )


def ssim(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Structural similarity with a Gaussian window of 11 x 11 and sigma 1.5, averaged over channels.

    Args:
        found: (N, H, W, C) uint8, at least 11 pixels high and wide.
        expected: the same shape.

    Returns:
        (N,) float64, at most 1.

    Source: Wang et al., "Image quality assessment: from error visibility to structural similarity", 2004, eq. 13.
    """
    x, y = (
        np.moveaxis(images, 3, 1).astype(np.float64) for images in (found, expected)
    )  # [N, C, H, W]
    down, across = _window(x.shape[2]), _window(x.shape[3]).T

    def blurred(images: np.ndarray) -> np.ndarray:
        return np.asarray(down @ images @ across)  # [N, C, H-10, W-10]

    mean_x, mean_y = blurred(x), blurred(y)
    variance_x, variance_y = blurred(x * x) - mean_x**2, blurred(y * y) - mean_y**2
    covariance = blurred(x * y) - mean_x * mean_y
    c1, c2 = (K1 * LEVELS) ** 2, (K2 * LEVELS) ** 2
    above = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    below = (mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2)
    return np.asarray((above / below).mean(axis=(1, 2, 3)))


def _window(size: int) -> np.ndarray:
    """The (size - 10, size) matrix that slides the Gaussian window over a line without leaving it."""
    offsets = np.arange(WINDOW) - WINDOW // 2
    weights = np.exp(-0.5 * (offsets / SIGMA) ** 2)
    matrix = np.zeros((size - WINDOW + 1, size))
    for row in range(len(matrix)):
        matrix[row, row : row + WINDOW] = weights / weights.sum()
    return matrix
