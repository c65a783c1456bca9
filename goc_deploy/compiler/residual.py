"""The passes for schedules that predict the residual of whole steps."""

from __future__ import annotations

from goc_deploy.compiler.plan import Compute, Launch, Residual, Segment


def compute_all_units(
    launches: tuple[tuple[Launch, ...], ...], units: int, *, merged: bool
) -> tuple[tuple[Launch, ...], ...]:
    """Replace the stand-in for all units of a step by the units, and keep what it stores.

    Before: step 4 computes unit 0 and stores it in slot 1. After: step 4 computes every unit,
    stores none of their features, and keeps the residual in slot 1. Predictions stay.

    Args:
        launches: [T] the launches of a schedule with one feature per step.
        units: number of units U.
        merged: whether to compute all units as one segment.
    """
    every_unit: tuple[Launch, ...] = tuple(Compute(unit, None) for unit in range(units))
    if merged:
        every_unit = (Segment((None,) * units),)

    def expanded(op: Launch) -> tuple[Launch, ...]:
        if not isinstance(op, Compute):
            return (op,)
        return every_unit if op.store is None else (*every_unit, Residual(op.store))

    return tuple(tuple(one for op in step for one in expanded(op)) for step in launches)
