"""The passes for schedules that predict the residual of whole steps."""

from __future__ import annotations

from goc_deploy.compiler.plan import Compute, Launch, Residual, Segment
from goc_deploy.spec import ModelSpec


def compute_all_units(
    launches: tuple[tuple[Launch, ...], ...], spec: ModelSpec, *, merged: bool
) -> tuple[tuple[Launch, ...], ...]:
    """Replace the stand-in for all units of a step by the units, and keep what it stores.

    Before: step 4 computes unit 0 and stores it in slot 1. After: step 4 computes every unit,
    stores none of their features, and keeps the residual in slot 1. Predictions stay.

    Args:
        launches: [T] the launches of a schedule with one feature per step.
        spec: the model.
        merged: whether to compute all units as one segment.
    """
    every_unit: tuple[Launch, ...] = tuple(
        Compute(index, (None,) * len(unit.features))
        for index, unit in enumerate(spec.declared_units)
    )
    if merged:
        every_unit = (Segment((None,) * len(spec.features)),)

    def expanded(op: Launch) -> tuple[Launch, ...]:
        if not isinstance(op, Compute):
            return (op,)
        (store,) = op.stores
        return every_unit if store is None else (*every_unit, Residual(store))

    return tuple(tuple(one for op in step for one in expanded(op)) for step in launches)
