"""Fitting coefficients along the cached trajectory, all calibration images in lock-step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np

from goc_deploy.options import Progress
from goc_deploy.policies.least_squares import FitOptions, NormalEquations, solve
from goc_deploy.runtime.calibration.trajectory import Row, Trajectory
from goc_deploy.schedule import REUSE, Schedule

Place = TypeVar("Place")


def fitted_schedule(
    schedule: Schedule, trajectories: Sequence[Trajectory], options: FitOptions, progress: Progress
) -> Schedule:
    """Replace plain reuse by fitted coefficients.

    Step by step: where units are reused, a full step from the cached latents shows what they should give; the
    coefficients are fitted to that over all images, and all images take the step with them, so that later steps are
    fitted to what the cached trajectory really meets. ``global`` goes along with coefficients per step and fits its own
    to the sums of all steps.

    Args:
        schedule: what is computed and what is reused.
        trajectories: the calibration images at step 0, which keep as much history as ``options.entries``.
        options: how to fit.
        progress: called with (what, done, total).
    """
    steps: list[tuple[Row, ...]] = []
    seen: dict[tuple[int, int], NormalEquations] = {}
    for step, rows in enumerate(schedule.coefficients):
        reused = [unit for unit, row in enumerate(rows) if row == REUSE]
        equations = _equations(trajectories, step, reused) if reused else {}
        seen |= {(step, unit): found for unit, found in equations.items()}
        groups = _by_entries(equations)
        made = list(rows)
        for units in groups:
            coefficients = solve(_total([equations[unit] for unit in units]), options.ridge)
            for unit in units:
                made[unit] = coefficients
        steps.append(tuple(made))
        for trajectory in trajectories:
            trajectory.advance(step, made)
        progress("fitting", step + 1, schedule.steps)
    if options.granularity == "global":
        for places in _by_entries(seen):
            coefficients = solve(_total([seen[place] for place in places]), options.ridge)
            steps = [
                tuple(
                    coefficients if (step, unit) in places else row for unit, row in enumerate(rows)
                )
                for step, rows in enumerate(steps)
            ]
    return replace(schedule, coefficients=tuple(steps))


def _equations(
    trajectories: Sequence[Trajectory], step: int, units: list[int]
) -> dict[int, NormalEquations]:
    """What the history says of the features of a full step, summed over all images."""
    equations = {unit: NormalEquations.zeros(len(trajectories[0].history(unit))) for unit in units}
    for trajectory in trajectories:

        def see(unit: int, feature: np.ndarray, trajectory: Trajectory = trajectory) -> None:
            if unit in equations:
                equations[unit].see(trajectory.history(unit), np.asarray(feature, np.float32))

        trajectory.look(step, see)
    return equations


def _by_entries(equations: dict[Place, NormalEquations]) -> list[list[Place]]:
    """Places with as many history entries as each other."""
    sizes = sorted({len(found.cross) for found in equations.values()})
    return [
        [place for place, found in equations.items() if len(found.cross) == size] for size in sizes
    ]


def _total(equations: list[NormalEquations]) -> NormalEquations:
    return NormalEquations(
        np.sum([e.gram for e in equations], axis=0), np.sum([e.cross for e in equations], axis=0)
    )
