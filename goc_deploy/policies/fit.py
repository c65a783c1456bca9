"""The correction ``fit``: coefficients fitted by least squares on calibration images."""

from __future__ import annotations

from goc_deploy.errors import UsageError
from goc_deploy.policies.context import PolicyContext
from goc_deploy.policies.grammar import number, whole_number
from goc_deploy.policies.least_squares import GRANULARITIES, TARGETS, FitOptions
from goc_deploy.schedule import MAX_HISTORY, Schedule


def fit(schedule: Schedule, argument: str, context: PolicyContext) -> Schedule:
    """``fit[:n]``: coefficients over n history entries, fitted on calibration images along the cached trajectory.

    See `goc_deploy.policies.least_squares.FitOptions` for ``fit=``, ``target=`` and ``ridge=``.
    """
    options = context.options
    entries = (
        whole_number(argument, "history entries", 1, MAX_HISTORY)
        if argument
        else FitOptions().entries
    )
    granularity = options.get("fit", FitOptions().granularity)
    ridge = number(options["ridge"], "ridge") if "ridge" in options else FitOptions().ridge
    if granularity not in GRANULARITIES:
        raise UsageError(f"fit {granularity!r} must be {', '.join(GRANULARITIES)}")
    if not ridge > 0:
        raise UsageError(f"ridge {ridge:g} must be above 0")
    target = options.get("target", FitOptions().target)
    if target not in TARGETS:
        raise UsageError(f"target {target!r} must be {' or '.join(TARGETS)}")
    return (
        context.engine()
        .calibrator(schedule.steps)
        .fit(schedule, FitOptions(entries, granularity, target, ridge))
    )
