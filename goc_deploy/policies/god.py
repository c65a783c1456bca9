"""GOD: where the gradient helps, judged by features averaged over images that ran without cache.

With mean features A_k of a unit, ``d = A_k - A_(k-1)`` is what reuse misses at step k and ``e =
A_(k-1) - A_(k-2)`` the trend that the gradient extends. Where extending it raises the error, the
unit is *inverse*. Source: "Accelerating Diffusion Transformer via Gradient-Optimized Cache", eq. 7
and 8, and the threshold after them, which has no number.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from goc_deploy.policies.calibration import Reading
from goc_deploy.schedule import REUSE, Schedule, gradient


def is_inverse(missed: np.ndarray, trend: np.ndarray, eta: float, reading: Reading) -> bool:
    """Whether the gradient raises the L1 error of one unit at one step.

    Args:
        missed: d.
        trend: e, of the same shape.
        eta: step size, which ``at_eta`` tests.
        reading: ``exists``: no eta > 0 lowers the error. It is convex in eta, so that is its right
            derivative at 0, ``sum over d = 0 of |e| - sum over d != 0 of sign(d) * e``, being not
            negative. ``at_eta``: this one does not.
    """
    d, e = missed.astype(np.float64), trend.astype(np.float64)
    if reading == "at_eta":
        return bool(np.abs(d - eta * e).sum() >= np.abs(d).sum())
    return bool((np.sign(d) * e).sum() <= np.abs(e[d == 0]).sum())


def inverse_units(means: np.ndarray, eta: float, reading: Reading) -> np.ndarray:
    """Which units are inverse at which step.

    Args:
        means: (T, U, tokens, D) mean features.
        eta: as in `is_inverse`.
        reading: as in `is_inverse`.

    Returns:
        (T, U) bool; False at steps 0 and 1, which have no trend.
    """
    steps, units = means.shape[:2]
    inverse = np.zeros((steps, units), bool)
    for unit in range(units):
        for step in range(2, steps):
            now, before, earlier = means[step, unit], means[step - 1, unit], means[step - 2, unit]
            inverse[step, unit] = is_inverse(now - before, before - earlier, eta, reading)
    return inverse


def boundaries(inverse: np.ndarray, gamma: float) -> np.ndarray:
    """``B(k) = gamma * (1 - t/T) + (1 - gamma) * N(k)``, where t = T - k counts down.

    Args:
        inverse: (T, U); N(k) is the mean of a row.
        gamma: weight of the position against N, 0..1.

    Returns:
        (T, U): B with every unit's own N in place of the step's; average over units for B(k).
    """
    steps = inverse.shape[0]
    position = np.arange(steps)[:, None] / steps
    own: np.ndarray = gamma * position + (1 - gamma) * inverse
    return own


def where_reused(schedule: Schedule, *, all_branches: bool) -> np.ndarray:
    """(T, U) where a unit is plainly reused, with ``all_branches`` only in wholly reused blocks."""
    reused = np.array([[row == REUSE for row in step] for step in schedule.coefficients])
    if not all_branches:
        return reused
    blocks = np.array([place.block for place in schedule.places])
    wholly = [reused[:, blocks == block].all(axis=1) for block in range(schedule.depth)]
    return np.stack(wholly, axis=1)[:, blocks]


def with_gradient_at(schedule: Schedule, chosen: np.ndarray, eta: float) -> Schedule:
    """Turn plain reuse into the gradient where ``chosen`` (T, U) says so and history allows.

    Before: ``reuse`` at steps 1, 3 and 5, chosen at 1 and 5. After: ``reuse`` at 1 (one entry) and
    3, ``gradient`` at 5.
    """
    rows = [list(step) for step in schedule.coefficients]
    for step, unit, stored in schedule.available_history():
        if rows[step][unit] == REUSE and chosen[step, unit] and stored >= 2:
            rows[step][unit] = gradient(eta)
    return replace(schedule, coefficients=tuple(tuple(step) for step in rows))


@dataclass(frozen=True, slots=True)
class Decision:
    """What GOD decides at one threshold.

    Attributes:
        schedule: the result.
        eta: step size of the gradient.
        threshold: gradient where B is below (the paper's capital Gamma).
        boundary: [T] B(k).
    """

    schedule: Schedule
    eta: float
    threshold: float
    boundary: tuple[float, ...]


def decide(
    schedule: Schedule,
    allowed: np.ndarray,
    inverse: np.ndarray,
    eta: float,
    gamma: float,
    threshold: float,
    *,
    per_unit: bool = False,
) -> Decision:
    """Use the gradient where B is below the threshold.

    That is at whole steps, or with ``per_unit`` for each unit by its own test. ``allowed`` (T, U)
    says which units of a step may have it at all.
    """
    own = boundaries(inverse, gamma)
    of_step = own.mean(axis=1)
    chosen = (
        own < threshold
        if per_unit
        else np.repeat(of_step[:, None] < threshold, own.shape[1], axis=1)
    )
    return Decision(
        with_gradient_at(schedule, chosen & allowed, eta), eta, threshold, tuple(of_step.tolist())
    )


def candidate_thresholds(
    schedule: Schedule, inverse: np.ndarray, gamma: float, *, per_unit: bool, most: int
) -> tuple[float, ...]:
    """Thresholds that decide differently for this schedule, at most ``most``, evenly taken.

    The first is 0, plain reuse everywhere, the last is 2, the gradient everywhere: B is within
    0..1.
    """
    own = boundaries(inverse, gamma)
    values = own if per_unit else np.repeat(own.mean(axis=1)[:, None], own.shape[1], axis=1)
    reused = where_reused(schedule, all_branches=False)
    distinct = np.unique(values[reused]) if reused.any() else np.empty(0)
    between = ((distinct[:-1] + distinct[1:]) / 2).tolist()
    if len(between) > most - 2:
        between = [between[round(i)] for i in np.linspace(0, len(between) - 1, max(0, most - 2))]
    return (0.0, *between, 2.0)
