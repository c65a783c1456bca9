"""Fitting coefficients to the final latents: least squares, linearized."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np

from goc_deploy.policies.fit import FitOptions
from goc_deploy.runtime.calibration.trajectory import Row, Trajectory
from goc_deploy.schedule import REUSE, Schedule

# Step of the difference quotients: far above float32 noise, and small compared with weights near 1.
DELTA = 0.1
MAX_WEIGHT = 2.0
ITERATIONS = 2
STARTS = (0.0, 0.5, 1.0)  # eta of the gradient; 0 is plain reuse

# A batch at step 0, and its final latents (N, C, H, W) without cache.
Pair = tuple[Trajectory, np.ndarray]


@dataclass(slots=True)
class NormalEquations:
    """Sums over images of ``V V^T`` and ``V t``, for a target t to be predicted from the rows of V.

    Attributes:
        gram: (n, n) float64.
        cross: (n,) float64.
    """

    gram: np.ndarray
    cross: np.ndarray

    @classmethod
    def zeros(cls, entries: int) -> NormalEquations:
        """The sums over no images."""
        return cls(np.zeros((entries, entries)), np.zeros(entries))

    def see(self, rows: list[np.ndarray], target: np.ndarray) -> None:
        """Add the rows and the target of one batch."""
        for i, left in enumerate(rows):
            self.cross[i] += np.dot(left.ravel(), target.ravel())
            for j, right in enumerate(rows[: i + 1]):
                self.gram[i, j] += np.dot(left.ravel(), right.ravel())
                self.gram[j, i] = self.gram[i, j]


@dataclass(frozen=True, slots=True)
class Direction:
    """A weight to fit: ``weight * (g_order - g_(order + 1))`` is added to the reused features.

    Attributes:
        places: step and unit of each feature that the weight changes.
        order: index of the newer of the two history entries.
    """

    places: tuple[tuple[int, int], ...]
    order: int


def directions(schedule: Schedule, options: FitOptions) -> list[Direction]:
    """The weights that can be fitted: one per difference of two entries, for units that are reused.

    A unit is included if its history is long enough. By ``options.granularity``, the units of a
    step or of all steps share weights.
    """
    groups: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for step, unit, stored in schedule.available_history():
        if schedule.coefficients[step][unit] == REUSE:
            for order in range(min(stored, options.entries) - 1):
                sharing = (step,) if options.granularity == "step" else ()
                groups.setdefault((*sharing, order), []).append((step, unit))
    return [Direction(tuple(places), key[-1]) for key, places in groups.items()]


def with_weights(schedule: Schedule, fitted: list[Direction], weights: np.ndarray) -> Schedule:
    """The schedule with weights along directions in place of plain reuse.

    For example, weights 1.0 and 0.2 along orders 0 and 1 change reuse to ``(2.0, -0.8, -0.2)``.
    """
    rows = [list(step) for step in schedule.coefficients]
    for direction, weight in zip(fitted, weights.tolist(), strict=True):
        for step, unit in direction.places:
            row = [*rows[step][unit], *[0.0] * (direction.order + 2 - len(rows[step][unit]))]
            row[direction.order] += weight
            row[direction.order + 1] -= weight
            rows[step][unit] = tuple(row)
    return replace(schedule, coefficients=tuple(tuple(step) for step in rows))


def fit_to_final(
    schedule: Schedule,
    pairs: Callable[[], Iterable[Pair]],
    batches: int,
    error: Callable[[Schedule], float],
    options: FitOptions,
    progress: Callable[[str, int, int], None],
) -> Schedule:
    """Replace plain reuse by weights that minimize the error of the final latents.

    The method is Gauss-Newton. The effect of a weight on the final latents is a difference
    quotient: the cached trajectory is forked at the first step that the weight changes. A ridge
    pulls the weights of an iteration toward the previous weights. The method stops at an iteration
    that does not lower the measured error. It starts from the best eta of ``STARTS``, so the result
    is not worse than plain reuse or the gradient on the calibration images.

    Args:
        schedule: the schedule, with plain reuse.
        pairs: returns the calibration images in batches, from the beginning in each call.
        batches: number of batches of ``pairs``.
        error: returns the measured error of a schedule, infinite if it cannot be measured.
        options: options of the fit.
        progress: called with (what, done, total).

    Returns:
        The schedule with the fitted weights.
    """
    fitted = directions(schedule, options)
    slope = np.array([float(direction.order == 0) for direction in fitted])
    starts = [eta * slope for eta in STARTS]
    weights = min(starts, key=lambda start: error(with_weights(schedule, fitted, start)))
    best = error(with_weights(schedule, fitted, weights))
    for iteration in range(ITERATIONS if fitted else 0):
        equations = NormalEquations.zeros(len(fitted))
        for batch, (trajectory, expected) in enumerate(pairs()):
            progress(f"fitting, pass {iteration + 1} of {ITERATIONS}", batch, batches)
            columns, final = _effects(schedule, fitted, weights, trajectory)
            equations.see(columns, expected - final)
        ridge = options.ridge * np.diag(
            np.maximum(np.diag(equations.gram), np.finfo(np.float64).tiny)
        )
        step = np.linalg.solve(equations.gram + ridge, equations.cross)
        tried = np.clip(weights + step, -MAX_WEIGHT, MAX_WEIGHT)
        measured = error(with_weights(schedule, fitted, tried))
        if not measured < best:
            break
        weights, best = tried, measured
    return with_weights(schedule, fitted, weights)


def _effects(
    schedule: Schedule, fitted: list[Direction], weights: np.ndarray, trajectory: Trajectory
) -> tuple[list[np.ndarray], np.ndarray]:
    """The effect of each weight on the final latents, and the final latents."""
    base = with_weights(schedule, fitted, weights)
    changed = []
    forks: dict[int, list[int]] = {}
    for index, direction in enumerate(fitted):
        moved = weights.copy()
        moved[index] += DELTA
        changed.append(with_weights(schedule, fitted, moved).coefficients)
        forks.setdefault(min(step for step, _ in direction.places), []).append(index)
    ends: dict[int, np.ndarray] = {}
    for step, rows in enumerate(base.coefficients):
        for index in forks.get(step, []):
            ends[index] = _finish(trajectory.fork(), step, changed[index])
        trajectory.advance(step, rows)
    final = trajectory.latents
    return [(ends[index] - final) / DELTA for index in range(len(fitted))], final


def _finish(
    trajectory: Trajectory, first: int, coefficients: tuple[tuple[Row, ...], ...]
) -> np.ndarray:
    for step in range(first, len(coefficients)):
        trajectory.advance(step, coefficients[step])
    return trajectory.latents
