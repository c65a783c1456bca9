"""The check that a plan predicts what its schedule asks for."""

from __future__ import annotations

import random
from collections.abc import Sequence

from goc_deploy.compiler.plan import Accumulate, Compute, Plan, Predict, Prediction, Residual
from goc_deploy.errors import EngineDirError
from goc_deploy.schedule import MAX_HISTORY, Schedule, fill_short_history

TOLERANCE = 1e-6

# By step and unit, a number in place of a computed feature; or by step, in place of the residual.
_Features = Sequence[Sequence[float]]


def check_agreement(plan: Plan) -> None:
    """Check that a plan and its schedule use the same predictions.

    Both are followed with random numbers in place of features. Two linear combinations of computed
    features that differ do so for almost all numbers, and no plan can depend on them.
    `goc_deploy.compiler.check.check_plan` must have accepted the plan.

    Raises:
        EngineDirError: naming the first step and unit at which they differ.
    """
    schedule = fill_short_history(plan.schedule)
    generator = random.SystemRandom()
    features = [[generator.uniform(0.5, 1) for _ in rows] for rows in schedule.feature_rows]
    asked, planned = _asked(schedule, features), _planned(plan, features)
    for step, (rows, used) in enumerate(zip(asked, planned, strict=True)):
        for unit, (wanted, value) in enumerate(zip(rows, used, strict=True)):
            if not abs(wanted - value) <= TOLERANCE * max(1.0, abs(wanted)):
                raise EngineDirError(
                    f"plan {plan.name} does not do what its schedule asks for at "
                    f"{schedule.place(step, unit)}; add the plan again"
                )


def _asked(schedule: Schedule, features: _Features) -> list[list[float]]:
    """Compute what each unit adds at each step according to the schedule."""
    histories: list[list[float]] = [[] for _ in range(schedule.units)]
    asked = []
    for step, rows in enumerate(schedule.feature_rows):
        used = []
        for unit, row in enumerate(rows):
            history = histories[unit]
            value = sum(c * h for c, h in zip(row, history, strict=False))
            used.append(value if row else features[step][unit])
            if not row or schedule.history == "used":
                histories[unit] = [used[-1], *history][:MAX_HISTORY]
        asked.append(used)
    return asked


def _planned(plan: Plan, features: _Features) -> list[list[float]]:
    """Compute the same from the plan and its slots."""
    slots = [0.0] * plan.slots
    planned = [[0.0] * len(row) for row in features]
    whole = plan.schedule.level == "residual"
    for step, launches in enumerate(plan.launches):
        for op in launches:
            if isinstance(op, Compute):
                unit = 0 if whole else op.unit
                value = planned[step][unit] = features[step][unit]
                if op.store is not None:
                    slots[op.store] = value
            elif isinstance(op, Accumulate):
                for tap in op.taps:
                    planned[step + tap.ahead][op.unit] += tap.coefficient * slots[op.slot]
            elif isinstance(op, Residual):
                slots[op.store] = features[step][0]
            elif isinstance(op, Predict):
                sums = [_sum(prediction, slots) for prediction in op.predictions]
                for unit, (prediction, value) in enumerate(
                    zip(op.predictions, sums, strict=True), op.unit
                ):
                    planned[step + op.ahead][unit] = prediction.coefficients[0] * value
                    if prediction.store is not None:
                        slots[prediction.store] = value
    return planned


def _sum(prediction: Prediction, slots: Sequence[float]) -> float:
    """Compute the sum that a prediction stores, without its first coefficient, the factor."""
    if not prediction.slots:
        raise EngineDirError("a launch of the plan predicts from nothing; add the plan again")
    first, *others = (slots[slot] for slot in prediction.slots)
    return first + sum(c * v for c, v in zip(prediction.coefficients[1:], others, strict=True))
