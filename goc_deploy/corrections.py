"""Corrections: how a unit that a base policy reuses plainly is predicted instead."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from goc_deploy.bases import PolicyContext
from goc_deploy.errors import UsageError
from goc_deploy.grammar import number, whole_number
from goc_deploy.predictors import HERMITE_SIGMA, MAX_ORDER, hermite_row, lagrange_row, taylor_row
from goc_deploy.schedule import REUSE, Schedule, gradient

DEFAULT_ETA = 1.0
DEFAULT_ORDER = "2"

Row = Callable[
    [Sequence[int], int], tuple[float, ...]
]  # (computed steps, newest first; step) -> coefficients


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


def taylor(schedule: Schedule, argument: str, context: PolicyContext) -> Schedule:
    """``taylor[:ORDER]``: TaylorSeer."""
    return _over_computed(schedule, argument, context, taylor_row)


def lagrange(schedule: Schedule, argument: str, context: PolicyContext) -> Schedule:
    """``lagrange[:ORDER]``: the polynomial through the last ORDER + 1 computed features."""
    return _over_computed(schedule, argument, context, lagrange_row)


def hermite(schedule: Schedule, argument: str, context: PolicyContext) -> Schedule:
    """``hermite[:ORDER[:SIGMA]]``: HiCache."""
    order, _, sigma_text = argument.partition(":")
    sigma = number(sigma_text, "sigma") if sigma_text else HERMITE_SIGMA
    return _over_computed(
        schedule, order, context, lambda computed, step: hermite_row(computed, step, sigma)
    )


def _over_computed(
    schedule: Schedule, order_text: str, context: PolicyContext, row_of: Row
) -> Schedule:
    """Predict from the last ORDER + 1 features that were computed, or as many as there are."""
    order = whole_number(order_text or DEFAULT_ORDER, "order", 0, MAX_ORDER)
    if context.options.get("history", "computed") != "computed":
        raise UsageError("this predictor reads computed features only; leave out history=used")
    return predict_from_computed(schedule, order, row_of)


def predict_from_computed(schedule: Schedule, order: int, row_of: Row) -> Schedule:
    """Give every plainly reused evaluation the row of a predictor over the last ``order + 1`` computed features."""
    computed: list[list[int]] = [[] for _ in range(schedule.units)]  # newest first
    rows = []
    for step, actions in enumerate(schedule.coefficients):
        rows.append(
            tuple(
                row_of(computed[unit][: order + 1], step) if row == REUSE else row
                for unit, row in enumerate(actions)
            )
        )
        for unit, row in enumerate(actions):
            if not row:
                computed[unit].insert(0, step)
    return replace(schedule, coefficients=tuple(rows), history="computed")


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
