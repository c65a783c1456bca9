"""How the activations of a product are quantised: one scale, and factors of its channels.

The factors move range from activations to weights: ``x @ W = (x * f) @ (W / f)``.

Source: SmoothQuant (https://arxiv.org/abs/2211.10438), eq. 4.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from goc_deploy.errors import ModelError
from goc_deploy.exporters.quantize.blocks import float32_scales, quantized_blocks, rounded_up
from goc_deploy.exporters.quantize.rounding import LARGEST, rounded
from goc_deploy.exporters.quantize.statistics import InputStatistics

ALPHAS = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9)
# Fractions of the largest absolute value that is seen at which activations are cut off.
CLIPS = tuple(np.linspace(1.0, 0.3, 29).round(4).tolist())


@dataclass(frozen=True, slots=True)
class StaticInput:
    """How the input x (M, K) of a product is quantised.

    Attributes:
        scale: what 1 of the quantised values stands for.
        factors: (K,) float32 that x is multiplied by before, or None.
        dtype: dtype of the scales and factors in the weights file.
        alpha: how much of the range of x moves to the weights, or None without factors.
        clip: the clipping range divided by the largest absolute value that was seen.
        values: dtype of the quantised values of x and of the weight, see `rounding.LARGEST`.
    """

    scale: float
    factors: np.ndarray | None
    dtype: str
    alpha: float | None
    clip: float
    values: str = "int8"

    def quantized(self, matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Quantise the weight (K, N) that goes with x.

        Returns:
            Values (K, N) float32 that ``values`` can hold, and scales (N,) as in
            `quantized_blocks`.

        Raises:
            ModelError: a weight is not finite.
        """
        if self.factors is not None:
            matrix = matrix / self.factors[:, None]
        if self.values == "int8":
            integers, scales = quantized_blocks(matrix, "int8", self.dtype, len(matrix))
            return integers.astype(np.float32), scales[0]
        if not np.isfinite(matrix).all():
            raise ModelError("a weight to be quantised is infinite or not a number")
        largest = np.abs(matrix).max(axis=0)
        exact = np.where(largest == 0, np.float32(1), largest / LARGEST[self.values])
        stored = rounded_up(exact, self.dtype)
        return rounded(matrix / float32_scales(stored), self.values), stored

    def rounded(self, rows: np.ndarray) -> np.ndarray:
        """Return the values that stand for rows of x, in units of ``scale``."""
        smoothed = rows if self.factors is None else rows * self.factors
        return rounded(smoothed / np.float32(self.scale), self.values)


def static_input(
    seen: InputStatistics,
    matrix: np.ndarray,
    dtype: str,
    alpha: float | None,
    values: str = "int8",
) -> StaticInput:
    """Choose the factors of an alpha, and the clipping range with the least error on the samples.

    The error of a channel counts by the squared norm of its row of the weight, which is what the
    product makes of it.

    Args:
        seen: what calibration saw; its range is not zero.
        matrix: the weight (K, N) float32.
        dtype: dtype of the scales and factors.
        alpha: SmoothQuant's migration strength, or None for no factors.
        values: dtype of the quantised values.
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
        stored = rounded_up(np.array(largest.max() * fraction / LARGEST[values]), dtype)
        scale = float(float32_scales(stored))
        difference = rounded(rows / np.float32(scale), values) * np.float32(scale) - rows
        error = float(np.square(difference).sum(axis=0) @ importance)
        if error < best:
            best, chosen, clip = error, scale, fraction
    return StaticInput(chosen, factors, dtype, alpha, clip, values)


def product_error(
    static: StaticInput, seen: InputStatistics, matrix: np.ndarray
) -> tuple[float, float]:
    """Squared error of a quantised product on the sampled rows, and the squared product."""
    weight, scales = static.quantized(matrix)
    exact = seen.rows @ matrix
    approximate = static.rounded(seen.rows) @ weight
    approximate *= float32_scales(scales) * np.float32(static.scale)
    return float(np.square(approximate - exact).sum()), float(np.square(exact).sum())


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
