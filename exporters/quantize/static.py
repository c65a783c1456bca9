"""How the activations of a product are quantised: one scale, and factors of its channels.

The factors move range from activations to weights: ``x @ W = (x * f) @ (W / f)``.

Source: SmoothQuant (https://arxiv.org/abs/2211.10438), eq. 4.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from goc_deploy.exporters.quantize.blocks import float32_scales, quantized_blocks, rounded_up
from goc_deploy.exporters.quantize.statistics import InputStatistics

ALPHAS = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9)
# Fractions of the largest absolute value that is seen at which activations are cut off.
CLIPS = tuple(np.linspace(1.0, 0.3, 29).round(4).tolist())
LARGEST = 127


@dataclass(frozen=True, slots=True)
class StaticInput:
    """How the input x (M, K) of a product is quantised.

    Attributes:
        scale: value of an integer step; x is clipped to 127 steps.
        factors: (K,) float32 that x is multiplied by before, or None.
        dtype: dtype of the scales and factors in the weights file.
        alpha: how much of the range of x moves to the weights, or None without factors.
        clip: the clipping range divided by the largest absolute value that was seen.
    """

    scale: float
    factors: np.ndarray | None
    dtype: str
    alpha: float | None
    clip: float

    def quantized(self, matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Quantise the weight (K, N) that goes with x.

        Returns:
            Integers (K, N) int8, and scales (N,) as in `quantized_blocks`.

        Raises:
            ModelError: a weight is not finite.
        """
        if self.factors is not None:
            matrix = matrix / self.factors[:, None]
        integers, scales = quantized_blocks(matrix, "int8", self.dtype, len(matrix))
        return integers, scales[0]

    def rounded(self, rows: np.ndarray) -> np.ndarray:
        """Return the values that stand for rows of x, in units of ``scale``."""
        smoothed = rows if self.factors is None else rows * self.factors
        return _rounded(smoothed, self.scale)


def static_input(
    seen: InputStatistics, matrix: np.ndarray, dtype: str, alpha: float | None
) -> StaticInput:
    """Choose the factors of an alpha, and the clipping range with the least error on the samples.

    The error of a channel counts by the squared norm of its row of the weight, which is what the
    product makes of it.

    Args:
        seen: what calibration saw; its range is not zero.
        matrix: the weight (K, N) float32.
        dtype: dtype of the scales and factors.
        alpha: SmoothQuant's migration strength, or None for no factors.
    """
    rows, largest, factors = seen.rows, seen.largest, None
    if alpha is not None:
        weights = np.abs(matrix).max(axis=1)
        usable = (largest > 0) & (weights > 0)
        exact = np.ones_like(largest)
        exact[usable] = weights[usable] ** (1 - alpha) / largest[usable] ** alpha
        exact /= np.exp(np.log(exact).mean())  # keeps the factors within the range of float16
        factors = float32_scales(rounded_up(exact, dtype))
        rows, largest, matrix = rows * factors, largest * factors, matrix / factors[:, None]
    importance = np.square(matrix).sum(axis=1)
    best, chosen, clip = np.inf, 0.0, 1.0
    for fraction in CLIPS:
        stored = rounded_up(np.array(largest.max() * fraction / LARGEST), dtype)
        scale = float(float32_scales(stored))
        difference = _rounded(rows, scale) * np.float32(scale) - rows
        error = float(np.square(difference).sum(axis=0) @ importance)
        if error < best:
            best, chosen, clip = error, scale, fraction
    return StaticInput(chosen, factors, dtype, alpha, clip)


def product_error(
    static: StaticInput, seen: InputStatistics, matrix: np.ndarray
) -> tuple[float, float]:
    """Squared error of a quantised product on the sampled rows, and the squared product."""
    integers, scales = static.quantized(matrix)
    exact = seen.rows @ matrix
    found = static.rounded(seen.rows) @ integers.astype(np.float32)
    found *= float32_scales(scales) * np.float32(static.scale)
    return float(np.square(found - exact).sum()), float(np.square(exact).sum())


def best_alpha(products: Iterable[tuple[InputStatistics, np.ndarray]], dtype: str) -> float | None:
    """Find the alpha with the least relative error over products of one kind.

    Args:
        products: what was seen of each, and its weight (K, N) float32.
        dtype: dtype of the scales and factors.

    Returns:
        The alpha, or None if the products are best without factors.
    """
    tried: tuple[float | None, ...] = (None, *ALPHAS)
    sums = {alpha: np.zeros(2) for alpha in tried}
    for seen, matrix in products:
        for alpha in tried:
            static = static_input(seen, matrix, dtype, alpha)
            sums[alpha] += product_error(static, seen, matrix)
    return min(tried, key=lambda alpha: float(sums[alpha][0] / sums[alpha][1]))


def _rounded(values: np.ndarray, scale: float) -> np.ndarray:
    rounded: np.ndarray = np.rint(values / np.float32(scale)).clip(-LARGEST - 1, LARGEST)
    return rounded
