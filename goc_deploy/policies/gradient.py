"""The gradient corrections ``gc`` and ``steps``. Source: GOC, equation 5."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from goc_deploy.errors import UsageError
from goc_deploy.policies.context import PolicyContext
from goc_deploy.policies.options import argument
from goc_deploy.schedule import REUSE, Schedule, gradient

DEFAULT_ETA = 1.0
ETA_HELP = "Step size of the gradient."


@dataclass(frozen=True, slots=True)
class GradientOptions:
    """Options of `gradient_everywhere`."""

    eta: float = argument(ETA_HELP, default=DEFAULT_ETA)


def gradient_everywhere(
    schedule: Schedule, options: GradientOptions, _context: PolicyContext
) -> Schedule:
    """``gc``: the gradient wherever history allows (GOC without GOD)."""
    return _with_gradient(schedule, range(schedule.steps), options.eta)


@dataclass(frozen=True, slots=True)
class GradientStepsOptions:
    """Options of `gradient_at_steps`."""

    steps: tuple[int, ...] = argument("Steps that use the gradient.", form="K,K,..")
    eta: float = argument(ETA_HELP, default=DEFAULT_ETA)


def gradient_at_steps(
    schedule: Schedule, options: GradientStepsOptions, _context: PolicyContext
) -> Schedule:
    """``steps``: the gradient at these steps."""
    if max(options.steps) >= schedule.steps:
        raise UsageError(f"step {max(options.steps)} is beyond the last step {schedule.steps - 1}")
    return _with_gradient(schedule, options.steps, options.eta)


def _with_gradient(schedule: Schedule, steps: Collection[int], eta: float) -> Schedule:
    """The gradient instead of plain reuse at these steps, if history allows, as GOC does."""
    rows = tuple(
        tuple(gradient(eta) if row == REUSE and k in steps else row for row in step)
        for k, step in enumerate(schedule.coefficients)
    )
    return replace(schedule, coefficients=rows, short_history="reuse")


def only_where_all_branches_are_reused(base: Schedule, corrected: Schedule) -> Schedule:
    """Undo a correction in blocks that compute a branch, as the authors' L2C variant does."""
    rows = []
    for before, after in zip(base.coefficients, corrected.coefficients, strict=True):
        computing = {place.block for place, row in zip(base.places, before, strict=True) if not row}
        rows.append(
            tuple(
                before[unit] if place.block in computing else after[unit]
                for unit, place in enumerate(base.places)
            )
        )
    return replace(corrected, coefficients=tuple(rows))
