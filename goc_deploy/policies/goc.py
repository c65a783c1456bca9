"""Corrections that learn from calibration images: where the gradient helps (GOD), and fitted coefficients."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from goc_deploy.errors import UsageError
from goc_deploy.policies import god
from goc_deploy.policies.calibration import Calibrator, measured_error
from goc_deploy.policies.context import PolicyContext
from goc_deploy.policies.god import Decision
from goc_deploy.policies.grammar import number
from goc_deploy.schedule import REUSE, Schedule

DEFAULT_GAMMA = 0.5
DEFAULT_READING = "at_eta"
ETAS = (0.4, 0.6, 0.8, 1.0, 1.2)
MOST_THRESHOLDS = 6


def goc(schedule: Schedule, argument: str, context: PolicyContext) -> Schedule:
    """``goc[:ETA]``: the gradient where GOD says so.

    Without ETA the step size is the best of ``ETAS`` for the gradient everywhere. ``threshold=auto`` takes the
    threshold whose schedule has the least measured error; the gradient everywhere and plain reuse are among them, so on
    the calibration images it is never worse than either.
    """
    options = context.options
    gamma = number(options.get("gamma", str(DEFAULT_GAMMA)), "gamma")
    reading = options.get("reading", DEFAULT_READING)
    threshold_text, per_unit = options.get("threshold", "auto"), "per_unit" in options
    if not 0 <= gamma <= 1:
        raise UsageError(f"gamma {options['gamma']} must be within 0..1")
    if reading not in god.READINGS:
        raise UsageError(f"reading {reading!r} must be {' or '.join(god.READINGS)}")
    threshold = None if threshold_text == "auto" else number(threshold_text, "threshold")
    if argument:
        number(argument, "eta")
    calibrator = context.engine().calibrator(schedule.steps)
    allowed = _where_reused(schedule, all_branches="both_branches" in options)
    eta = number(argument, "eta") if argument else _best_eta(schedule, allowed, calibrator)
    inverse = god.inverse_units(calibrator.statistics().means, eta, reading)
    thresholds = (
        god.candidate_thresholds(schedule, inverse, gamma, per_unit=per_unit, most=MOST_THRESHOLDS)
        if threshold is None
        else (threshold,)
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
        "reading": reading,
        "per_unit": per_unit,
        "measured": [m for m in measured if math.isfinite(m["error"])],
        "calibration": calibrator.describe(),
    }
    return replace(decisions[best].schedule, provenance={**schedule.provenance, "god": record})


def _where_reused(schedule: Schedule, *, all_branches: bool) -> np.ndarray:
    """(T, U) where a unit is plainly reused, with ``all_branches`` together with the other branches of its block."""
    reused = np.array([[row == REUSE for row in step] for step in schedule.coefficients])
    if not all_branches:
        return reused
    blocks = reused.reshape(schedule.steps, schedule.depth, -1).all(axis=2)
    return np.repeat(blocks, len(schedule.branches), axis=1)


def _best_eta(schedule: Schedule, allowed: np.ndarray, calibrator: Calibrator) -> float:
    errors = {
        eta: measured_error(calibrator, god.with_gradient_at(schedule, allowed, eta))
        for eta in ETAS
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
