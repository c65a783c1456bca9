"""Kernel inception distance, which is unbiased even for few images, unlike FID."""

from __future__ import annotations

import numpy as np

from goc_deploy.metrics.estimate import NORMAL_95, Estimate, exact

SUBSETS, SUBSET_SIZE = 100, 1000


def squared_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel ``(x.y / d + 1)^3``.

    Args:
        x: (m, d) features, m at least 2.
        y: (m, d) features.
    """
    m = len(x)
    x, y = x.astype(np.float64), y.astype(np.float64)
    kernels = _kernel(x, x), _kernel(y, y)
    within = sum((k.sum() - np.trace(k)) / (m * (m - 1)) for k in kernels)
    return float(within - 2 * _kernel(x, y).mean())


def kernel_distance(
    x: np.ndarray,
    y: np.ndarray,
    seed: int,
    *,
    subsets: int = SUBSETS,
    subset_size: int = SUBSET_SIZE,
) -> Estimate:
    """Return the mean squared MMD over random subsets.

    The interval scales their spread from the size of a subset to that of the whole set.

    Args:
        x: (N, d) features of samples.
        y: (M, d) features of the reference.
        seed: seed of the subsets.
        subsets: number of subsets.
        subset_size: number of images in each; at most that of the smaller set.

    Source: Binkowski et al., "Demystifying MMD GANs", 2018. Interval: Politis and Romano, "Large
    sample confidence regions based on subsamples under minimal assumptions", 1994.
    """
    smaller = min(len(x), len(y))
    size = min(subset_size, smaller)
    generator = np.random.default_rng(seed)
    distances = [
        squared_mmd(
            x[generator.choice(len(x), size, replace=False)],
            y[generator.choice(len(y), size, replace=False)],
        )
        for _ in range(subsets)
    ]
    value = float(np.mean(distances))
    if size == smaller:  # the subsets are nearly the same, so their spread has no meaning
        return exact(value)
    half = NORMAL_95 * float(np.std(distances, ddof=1)) * (size / smaller) ** 0.5
    return Estimate(value, value - half, value + half)


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.asarray((x @ y.T / x.shape[1] + 1) ** 3)
