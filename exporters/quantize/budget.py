"""The format of each unit within a bound of the error: greedy, by their errors alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from goc_deploy.errors import VerificationError
from goc_deploy.metrics.paired import relative_l2
from goc_deploy.options import Progress
from goc_deploy.precision import WeightFormat

# Draws the calibration images with a plan, or with None without cache, where units have these
# formats and others keep the precision; returns the final latents (N, C, H, W).
Draw = Callable[[str | None, Mapping[str, WeightFormat]], np.ndarray]
# unit -> format -> bytes that it saves, or an error that it makes
Saved = Mapping[str, Mapping[WeightFormat, int]]
Alone = Mapping[str, Mapping[WeightFormat, float]]


@dataclass(frozen=True, slots=True)
class Budget:
    """What was measured, and the formats that fit into a bound.

    An error is the mean over the calibration images of the relative L2 of the final latents.

    Attributes:
        bound: the largest error of a plan to no cache in the precision.
        judge: the plan that has the largest error without quantised units.
        cached: error of every plan to no cache, without quantised units.
        alone: error of ``judge`` to itself with one quantised unit, for each unit and format.
        total: error of every plan to no cache in the precision, with the chosen formats.
        formats: the chosen format of each unit that is quantised, in the order of a step.
    """

    bound: float
    judge: str
    cached: Mapping[str, float]
    alone: Alone
    total: Mapping[str, float]
    formats: Mapping[str, WeightFormat]


def budget_of(
    bound: float,
    plans: Sequence[str],
    saved: Saved,
    draw: Draw,
    progress: Progress,
) -> Budget:
    """Choose the formats of units, and measure what they cost together.

    Errors of units add up like independent ones at first. The choice is then measured, and the
    costliest steps to a smaller format are taken back until the bound is kept.

    Args:
        bound: see `Budget`.
        plans: names of the plans.
        saved: unit -> format -> bytes that it saves; units in the order of a step.
        draw: draws the calibration images.
        progress: called with (what, done, total).

    Raises:
        VerificationError: a plan is above the bound without quantised units, or with any one unit.
    """
    progress("measuring plans without quantised units", 0, len(saved))
    reference = draw(None, {})
    own = {plan: draw(plan, {}) for plan in plans}
    cached = {plan: _error(latents, reference) for plan, latents in own.items()}
    judge = max(cached, key=lambda plan: cached[plan])
    if cached[judge] > bound:
        raise VerificationError(
            f"`max_error={bound:g}` cannot be met: plan {judge} has error {cached[judge]:.4g} on "
            "the calibration images without any quantised unit, which is the least that is "
            "reachable; choose a plan that computes more, or a larger bound"
        )
    alone: dict[str, dict[WeightFormat, float]] = {}
    for done, (unit, formats) in enumerate(saved.items()):
        progress(f"measuring {unit}", done, len(saved))
        alone[unit] = {
            wanted: _error(draw(judge, {unit: wanted}), own[judge]) for wanted in formats
        }
    steps = affordable(alone, saved, bound**2 - cached[judge] ** 2)
    least = np.inf
    while steps:
        latest = dict(steps)
        chosen = {unit: latest[unit] for unit in saved if unit in latest}
        progress(f"measuring {len(chosen)} units together", len(saved), len(saved))
        total = {plan: _error(draw(plan, chosen), reference) for plan in plans}
        largest = max(total.values())
        if largest <= bound:
            return Budget(bound, judge, cached, alone, total, chosen)
        least = min(least, largest)
        del steps[-max(1, len(steps) // 8) :]
    best = f"; the least that was reached is {least:.4g}" if np.isfinite(least) else ""
    error, cheapest, wanted = min(
        (error, unit, wanted) for unit, errors in alone.items() for wanted, error in errors.items()
    )
    raise VerificationError(
        f"`max_error={bound:g}` leaves room for no quantised unit: plan {judge} has error "
        f"{cached[judge]:.4g} without any, and {cheapest} alone in {wanted} changes it by "
        f"{error:.4g}{best}; choose a larger bound or a finer format"
    )


def affordable(alone: Alone, saved: Saved, squares: float) -> list[tuple[str, WeightFormat]]:
    """Move units to smaller formats while their squared errors sum up to at most ``squares``.

    The next move is the one that adds the least squared error per byte that it saves, from the
    format that the unit has by then.

    Returns:
        (unit, format) of the moves in this order; the last one of a unit holds.
    """
    moves: list[tuple[str, WeightFormat]] = []
    while True:
        latest = dict(moves)
        candidates = []
        for unit, errors in alone.items():
            now = latest.get(unit)
            square, size = (errors[now] ** 2, saved[unit][now]) if now else (0.0, 0)
            for wanted, error in errors.items():
                added, smaller = error**2 - square, saved[unit][wanted] - size
                if smaller > 0 and added <= squares:
                    candidates.append((added / smaller, unit, wanted, added))
        if not candidates:
            return moves
        _, unit, wanted, added = min(candidates, key=lambda candidate: candidate[0])
        squares -= added
        moves.append((unit, wanted))


def _error(latents: np.ndarray, expected: np.ndarray) -> float:
    error = float(relative_l2(latents, expected).mean())
    return error if np.isfinite(error) else float("inf")
