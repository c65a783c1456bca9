"""The gradient corrections ``gc`` and ``steps``. Source: GOC, equation 5."""

from __future__ import annotations

from dataclasses import replace

from goc_deploy.errors import UsageError
from goc_deploy.policies.context import PolicyContext
from goc_deploy.policies.grammar import number
from goc_deploy.schedule import REUSE, Schedule, gradient

DEFAULT_ETA = 1.0


def gradient_everywhere(schedule: Schedule, argument: str, _context: PolicyContext) -> Schedule:
    """``gc[:ETA]``: the gradient wherever history allows (GOC without GOD)."""
    return _with_gradient(
        schedule, set(range(schedule.steps)), number(argument, "eta") if argument else DEFAULT_ETA
    )


def gradient_at_steps(schedule: Schedule, argument: str, _context: PolicyContext) -> Schedule:
    """``steps:K,K,..:ETA``: the gradient at these steps."""
    steps_text, _, eta_text = argument.partition(":")
    if not all(part.isdecimal() for part in steps_text.split(",")):
        raise UsageError(f"steps {steps_text!r} must be whole numbers separated by commas")
    steps = {int(part) for part in steps_text.split(",")}
    if max(steps) >= schedule.steps:
        raise UsageError(f"step {max(steps)} is beyond the last step {schedule.steps - 1}")
    return _with_gradient(schedule, steps, number(eta_text, "eta") if eta_text else DEFAULT_ETA)


def _with_gradient(schedule: Schedule, steps: set[int], eta: float) -> Schedule:
    """Turn plain reuse into gradient reuse at these steps; where history is short plain reuse stays (as GOC does)."""
    rows = tuple(
        tuple(gradient(eta) if row == REUSE and k in steps else row for row in step)
        for k, step in enumerate(schedule.coefficients)
    )
    return replace(schedule, coefficients=rows, short_history="reuse")


def only_where_all_branches_are_reused(base: Schedule, corrected: Schedule) -> Schedule:
    """Undo a correction in blocks that compute a branch at that step, as the authors' L2C variant does."""
    branches = len(base.branches)
    rows = []
    for before, after in zip(base.coefficients, corrected.coefficients, strict=True):
        blocks = [before[first : first + branches] for first in range(0, len(before), branches)]
        rows.append(
            tuple(
                row if all(blocks[unit // branches]) else before[unit]
                for unit, row in enumerate(after)
            )
        )
    return replace(corrected, coefficients=tuple(rows))
