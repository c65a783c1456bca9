"""A number with its 95 % confidence interval."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

NORMAL_95 = 1.959964
MEAN_RESAMPLES = 1000
MAX_DRAWN = 2**20  # largest number of indices in memory at once


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value and the ends of its 95 % confidence interval, which equal the value without one."""

    value: float
    low: float
    high: float


def exact(value: float) -> Estimate:
    """Return a value without an interval."""
    return Estimate(float(value), float(value), float(value))


def mean_estimate(values: np.ndarray, seed: int) -> Estimate:
    """Return the mean of one number per image, with its percentile bootstrap interval.

    Args:
        values: (N,) one per image.
        seed: seed of the resampling.

    Source: Efron, "Bootstrap Methods: Another Look at the Jackknife", 1979; 1000 resamples.
    """
    values = np.asarray(values, np.float64)
    if len(values) < 2:
        return exact(values.mean())
    generator = np.random.default_rng(seed)
    at_a_time = max(1, MAX_DRAWN // len(values))
    means = [
        values[
            generator.integers(0, len(values), (min(at_a_time, MEAN_RESAMPLES - done), len(values)))
        ].mean(axis=1)
        for done in range(0, MEAN_RESAMPLES, at_a_time)
    ]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return Estimate(float(values.mean()), float(low), float(high))


def resampled_estimate(value: float, replicas: Sequence[float]) -> Estimate:
    """Return a statistic with the normal interval of the spread of its bootstrap replicas.

    Percentiles would mislead. A resample repeats images, which biases FID and IS, so the replicas
    may all be on one side of the value. Their spread is nevertheless right.
    """
    if len(replicas) < 2:
        return exact(value)
    half = NORMAL_95 * float(np.std(replicas, ddof=1))
    return Estimate(float(value), value - half, value + half)


def bootstrap(
    statistic: Callable[[np.ndarray], float], images: int, resamples: int, seed: int
) -> Estimate:
    """Return a statistic of a set of images, with its interval from resampled sets.

    Args:
        statistic: function of (N,) indices of images, which may repeat.
        images: number of images N.
        resamples: number of sets to draw; fewer than 2 estimate no interval.
        seed: seed of the resampling.
    """
    generator = np.random.default_rng(seed)
    replicas = [statistic(generator.integers(0, images, images)) for _ in range(resamples)]
    return resampled_estimate(statistic(np.arange(images)), replicas)
