"""Which units can be quantised within a bound of the error: greedy, by their errors alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from goc_deploy.errors import VerificationError
from goc_deploy.metrics.paired import relative_l2
from goc_deploy.options import Progress

# Draws the calibration images with a plan, or with None without cache, where these units are
# quantised; returns the final latents (N, C, H, W).
Draw = Callable[[str | None, Sequence[str]], np.ndarray]


@dataclass(frozen=True, slots=True)
class Budget:
    """What was measured, and the units that fit into a bound.

    An error is the mean over the calibration images of the relative L2 of the final latents.

    Attributes:
        bound: the largest error of a plan to no cache in the precision.
        judge: the plan that has the largest error without quantised units.
        cached: error of every plan to no cache, without quantised units.
        alone: error of ``judge`` to itself with one quantised unit, for each.
        total: error of every plan to no cache in the precision, with the units that were chosen.
        units: these units, in the order of a step.
    """

    bound: float
    judge: str
    cached: Mapping[str, float]
    alone: Mapping[str, float]
    total: Mapping[str, float]
    units: tuple[str, ...]


def budget_of(
    bound: float,
    plans: Sequence[str],
    saved: Mapping[str, int],
    draw: Draw,
    progress: Progress,
) -> Budget:
    """Choose the units to quantise, and measure what they cost together.

    Errors of units add up like independent ones at first. The choice is then measured, and the
    costliest units are taken back until the bound is kept.

    Args:
        bound: see `Budget`.
        plans: names of the plans.
        saved: unit -> bytes that it saves if it is quantised; in the order of a step.
        draw: draws the calibration images.
        progress: called with (what, done, total).

    Raises:
        VerificationError: a plan is above the bound without quantised units, or with any one unit.
    """
    progress("measuring plans without quantised units", 0, len(saved))
    reference = draw(None, ())
    own = {plan: draw(plan, ()) for plan in plans}
    cached = {plan: _error(latents, reference) for plan, latents in own.items()}
    judge = max(cached, key=lambda plan: cached[plan])
    if cached[judge] > bound:
        raise VerificationError(
            f"`max_error={bound:g}` cannot be met: plan {judge} has error {cached[judge]:.4g} on "
            "the calibration images without any quantised unit, which is the least that is "
            "reachable; choose a plan that computes more, or a larger bound"
        )
    alone = {}
    for done, unit in enumerate(saved):
        progress(f"measuring {unit}", done, len(saved))
        alone[unit] = _error(draw(judge, (unit,)), own[judge])
    chosen = affordable(alone, saved, bound**2 - cached[judge] ** 2)
    least = np.inf
    while True:
        units = tuple(unit for unit in saved if unit in chosen)
        progress(f"measuring {len(units)} units together", len(saved), len(saved))
        total = {plan: _error(draw(plan, units), reference) for plan in plans} if units else {}
        largest = max(total.values(), default=np.inf)
        if largest <= bound:
            return Budget(bound, judge, cached, alone, total, units)
        least = min(least, largest)
        if len(chosen) <= 1:
            break
        del chosen[-max(1, len(chosen) // 8) :]
    best = f"; the least that was reached is {least:.4g}" if np.isfinite(least) else ""
    cheapest = min(alone, key=lambda unit: alone[unit])
    raise VerificationError(
        f"`max_error={bound:g}` leaves room for no quantised unit: plan {judge} has error "
        f"{cached[judge]:.4g} without any, and {cheapest} alone changes it by "
        f"{alone[cheapest]:.4g}{best}; choose a larger bound or a finer format"
    )


def affordable(alone: Mapping[str, float], saved: Mapping[str, int], squares: float) -> list[str]:
    """Return units whose squared errors sum up to at most ``squares``, the cheapest first.

    Cheap is little squared error per byte that a unit saves.
    """
    chosen: list[str] = []
    for unit in sorted(alone, key=lambda unit: alone[unit] ** 2 / saved[unit]):
        if alone[unit] ** 2 <= squares:
            squares -= alone[unit] ** 2
            chosen.append(unit)
    return chosen


def _error(latents: np.ndarray, expected: np.ndarray) -> float:
    error = float(relative_l2(latents, expected).mean())
    return error if np.isfinite(error) else float("inf")
