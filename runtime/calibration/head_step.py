"""The fit of one step of a head: two weighted ridge regressions over rows in scratch files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from goc_deploy.runtime.calibration.head_equations import RidgeEquations, best_ridge

BLOCK_BYTES = 2**26  # of float64 features at a time
LEAST_SHARE = 1e-3  # images that are nearly exact weigh no more than those with this share of error
ROUNDING = 1e-6  # a residual below this share of the latents is rounding


@dataclass(frozen=True, slots=True)
class StepFit:
    """The weights of a step and what they gain.

    Attributes:
        weights: (F, P) float32.
        penalty: the penalty that held-out images chose, or None if the weights are zero.
        train: mean relative error of the latents of the training images, before and after.
        held_out: the same of the held-out images.
    """

    weights: np.ndarray
    penalty: float | None
    train: tuple[float, float]
    held_out: tuple[float, float]


def fit_step(
    features: np.ndarray, targets: np.ndarray, sizes: np.ndarray, held_out: np.ndarray
) -> StepFit:
    """Fit the weights of a step so that the mean norm of what is missing falls.

    Least squares lets the images with the largest errors rule. Therefore each image is weighted by
    1 / norm: first by that of its target, then by that of what the first fit leaves. The weights
    are zero if the held-out images gain nothing.

    Args:
        features: (N, cells, F) float32, may be a file in memory.
        targets: (N, cells, P) float32, what the latents of the cells miss.
        sizes: (N,) norms of the latents that are aimed at.
        held_out: (N,) bool, images that only judge.

    Source: Schlossmacher, "An Iterative Technique for Absolute Deviations Curve Fitting", Journal
    of the American Statistical Association, 1973.
    """
    zero = np.zeros((features.shape[2], targets.shape[2]), np.float32)
    before = residual_norms(features, targets, zero)
    nothing = StepFit(zero, None, *[(e, e) for e in _errors(before, sizes, held_out)])
    if not np.any(before > ROUNDING * sizes):
        return nothing
    norms, weights, penalty = before, zero, 0.0
    for _ in range(2):
        equations = _equations(features, targets, norms, held_out)
        penalty, solution = best_ridge(*equations)
        weights = solution.astype(np.float32)
        norms = residual_norms(features, targets, weights)
    errors = zip(_errors(before, sizes, held_out), _errors(norms, sizes, held_out), strict=True)
    train, judged = errors
    return StepFit(weights, penalty, train, judged) if judged[1] < judged[0] else nothing


def residual_norms(features: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """What each image misses after a correction by (F, P) float32 weights, (N,) float64 norms."""
    norms = np.empty(len(features))
    for block in _blocks(features):
        rest = targets[block] - features[block] @ weights
        norms[block] = np.sqrt(np.square(rest, dtype=np.float64).sum(axis=(1, 2)))
    return norms


def _equations(
    features: np.ndarray, targets: np.ndarray, norms: np.ndarray, held_out: np.ndarray
) -> tuple[RidgeEquations, RidgeEquations]:
    """The equations of the training and of the held-out images, weighted by 1 / norm."""
    (cells, width), values = features.shape[1:], targets.shape[2]
    sums = tuple(RidgeEquations.zeros(width, values) for _ in range(2))
    of_image = 1 / np.maximum(norms, LEAST_SHARE * norms.mean())
    for block in _blocks(features):
        z, r = features[block], targets[block]
        for equations, chosen in zip(sums, (~held_out[block], held_out[block]), strict=True):
            weights = np.repeat(of_image[block][chosen], cells)
            equations.see(z[chosen].reshape(-1, width), r[chosen].reshape(-1, values), weights)
    return sums[0], sums[1]


def _errors(norms: np.ndarray, sizes: np.ndarray, held_out: np.ndarray) -> list[float]:
    """Mean relative error of the training and of the held-out images."""
    relative = norms / sizes
    return [float(relative[~held_out].mean()), float(relative[held_out].mean())]


def _blocks(features: np.ndarray) -> Iterator[slice]:
    """Slices of images whose features in float64 fit into ``BLOCK_BYTES``."""
    size = max(1, BLOCK_BYTES // (features[0].size * 8))
    for first in range(0, len(features), size):
        yield slice(first, min(first + size, len(features)))
