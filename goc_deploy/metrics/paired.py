"""Distance of images from those of the same noise and labels without a cache, per image."""

from __future__ import annotations

import numpy as np

LEVELS = 255.0
WINDOW, SIGMA = 11, 1.5  # size and sigma of the window of SSIM
K1, K2 = 0.01, 0.03


def relative_l2(actual: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """``|actual - expected| / |expected|`` of every image.

    Args:
        actual: (N, ...) floats.
        expected: the same shape, no image all zero.

    Returns:
        (N,) float64.
    """
    difference = (actual.astype(np.float64) - expected).reshape(len(actual), -1)
    size = expected.astype(np.float64).reshape(len(actual), -1)
    return np.asarray(np.linalg.norm(difference, axis=1) / np.linalg.norm(size, axis=1))


def whole_relative_l2(actual: np.ndarray, expected: np.ndarray) -> float:
    """``|actual - expected| / |expected|`` over all values, in float64.

    The result is infinite if a value is not finite.
    """
    difference = float(np.linalg.norm(actual.astype(np.float64) - expected))
    error = difference / max(float(np.linalg.norm(expected.astype(np.float64))), 1e-30)
    return error if np.isfinite(error) else float("inf")


def psnr_db(actual: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in decibels, ``10 * log10(255**2 / mean squared error)``.

    Equal images would have an infinite ratio, and the mean would be infinite too. They count as if
    one value differed by one level.

    Args:
        actual: (N, H, W, C) uint8.
        expected: the same shape.

    Returns:
        (N,) float64.
    """
    squares = np.square(actual.astype(np.float64) - expected).reshape(len(actual), -1)
    return np.asarray(
        10 * np.log10(LEVELS**2 / np.maximum(squares.mean(axis=1), 1 / squares.shape[1]))
    )


def ssim(actual: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Structural similarity, averaged over channels; the window is Gaussian, 11 x 11, sigma 1.5.

    Args:
        actual: (N, H, W, C) uint8, at least 11 pixels high and wide.
        expected: the same shape.

    Returns:
        (N,) float64, at most 1.

    Source: Wang et al., "Image quality assessment: from error visibility to structural similarity",
    2004, eq. 13.
    """
    x, y = (
        np.moveaxis(images, 3, 1).astype(np.float64) for images in (actual, expected)
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
    """Return the (size - 10, size) matrix that slides the window over a line without leaving it."""
    offsets = np.arange(WINDOW) - WINDOW // 2
    weights = np.exp(-0.5 * (offsets / SIGMA) ** 2)
    matrix = np.zeros((size - WINDOW + 1, size))
    for row in range(len(matrix)):
        matrix[row, row : row + WINDOW] = weights / weights.sum()
    return matrix
