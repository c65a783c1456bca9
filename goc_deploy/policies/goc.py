"""The correction ``goc``: the gradient where GOD, measured on calibration images, allows it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from goc_deploy.policies.calibration import Calibrator, Reading, measured_error
from goc_deploy.policies.context import PolicyContext
from goc_deploy.policies.options import argument, option
from goc_deploy.schedule import Schedule

if TYPE_CHECKING:
    import numpy as np

    from goc_deploy.policies.god import Decision

ETAS = (0.4, 0.6, 0.8, 1.0, 1.2)
MOST_THRESHOLDS = 6


@dataclass(frozen=True, slots=True)
class GocOptions:
    """Options of `goc`."""

    eta: float | None = argument(
        f"Step size of the gradient. Without it, the best of {', '.join(map(str, ETAS))}.",
        default=None,
    )
    both_branches: bool = option(
        "Use the gradient only where all branches of a block are reused.", default=False
    )
    gamma: float = option(
        "Weight of a step's position against its share of inverse units.",
        default=0.5,
        low=0,
        high=1,
    )
    threshold: float | Literal["auto"] = option(
        "Use the gradient where the boundary is below it; auto measures some thresholds.",
        default="auto",
    )
    reading: Reading = option(
        "Whether a unit is inverse if no step size helps, or if ETA does not.", default="at_eta"
    )
    per_unit: bool = option("Decide for every unit on its own.", default=False)


def goc(schedule: Schedule, options: GocOptions, context: PolicyContext) -> Schedule:
    """``goc``: the gradient where GOD allows it.

    Without ETA the step size is the best of ``ETAS`` for the gradient everywhere.
    ``threshold=auto`` takes the threshold whose schedule has the least measured error; the gradient
    everywhere and plain reuse are among them, so on the calibration images it is never worse than
    either.
    """
    from goc_deploy.policies import god  # needs NumPy, which help texts do without

    calibrator = context.required_laboratory().calibrator(schedule.steps)
    allowed = god.where_reused(schedule, all_branches=options.both_branches)
    eta = _best_eta(schedule, allowed, calibrator) if options.eta is None else options.eta
    inverse = god.inverse_units(calibrator.statistics().means, eta, options.reading)
    gamma, per_unit = options.gamma, options.per_unit
    thresholds = (
        god.candidate_thresholds(schedule, inverse, gamma, per_unit=per_unit, most=MOST_THRESHOLDS)
        if options.threshold == "auto"
        else (options.threshold,)
    )
    decisions = [
        god.decide(schedule, allowed, inverse, eta, gamma, t, per_unit=per_unit) for t in thresholds
    ]
    errors = [measured_error(calibrator, decision.schedule) for decision in decisions]
    best = min(range(len(errors)), key=lambda i: (errors[i], -thresholds[i]))
    measured = [
        {"threshold": t, "error": error} for t, error in zip(thresholds, errors, strict=True)
    ]
    record = {
        **_record(decisions[best], inverse),
        "gamma": gamma,
        "reading": options.reading,
        "per_unit": per_unit,
        "measured": [m for m in measured if math.isfinite(m["error"])],
        "calibration": calibrator.describe(),
    }
    return replace(decisions[best].schedule, provenance={**schedule.provenance, "god": record})


def _best_eta(schedule: Schedule, allowed: np.ndarray, calibrator: Calibrator) -> float:
    from goc_deploy.policies.god import with_gradient_at

    errors = {
        eta: measured_error(calibrator, with_gradient_at(schedule, allowed, eta)) for eta in ETAS
    }
    return min(errors, key=lambda eta: errors[eta])


def _record(decision: Decision, inverse: np.ndarray) -> dict[str, object]:
    used = [any(len(row) > 1 for row in step) for step in decision.schedule.coefficients]
    return {
        "eta": decision.eta,
        "threshold": decision.threshold,
        "inverse_share": [round(float(n), 6) for n in inverse.mean(axis=1)],
        "boundary": [round(b, 6) for b in decision.boundary],
        "gradient_steps": [step for step, gradient in enumerate(used) if gradient],
    }
