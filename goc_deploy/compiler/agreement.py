"""The check that a plan predicts what its schedule asks for."""

from __future__ import annotations

import random
from collections.abc import Sequence

from goc_deploy.blocks import ALL_STREAMS
from goc_deploy.compiler.plan import Accumulate, Compute, Plan, Predict, Prediction, Residual
from goc_deploy.compiler.values import features_of_units
from goc_deploy.errors import EngineDirError
from goc_deploy.schedule import MAX_HISTORY, Schedule, fill_short_history
from goc_deploy.spec import ModelSpec

TOLERANCE = 1e-6

# By step and feature, a number in place of what is computed; or by step, of the residual.
_Features = Sequence[Sequence[float]]


def check_agreement(plan: Plan, spec: ModelSpec) -> None:
    """Check that a plan and its schedule use the same predictions.

    Both are followed with random numbers in place of features. Two linear combinations of computed
    features that differ do so for almost all numbers, and no plan can depend on them. A feature
    of another stream than the image may be left out. `goc_deploy.compiler.check.check_plan` must
    have accepted the plan.

    Raises:
        EngineDirError: naming the first step and unit at which they differ.
    """
    schedule = fill_short_history(plan.schedule)
    by_unit = schedule.level == "unit"
    units = [place.unit for place in spec.features] if by_unit else [0]
    generator = random.SystemRandom()
    features = [[generator.uniform(0.5, 1) for _ in units] for _ in range(schedule.steps)]
    asked, planned = _asked(schedule, units, features), _planned(plan, spec, features)
    for step, (rows, used) in enumerate(zip(asked, planned, strict=True)):
        for feature, (wanted, value) in enumerate(zip(rows, used, strict=True)):
            if value is None and spec.features[feature].feature.stream != "image":
                continue
            if value is None or not abs(wanted - value) <= TOLERANCE * max(1.0, abs(wanted)):
                raise EngineDirError(
                    f"plan {plan.name} does not do what its schedule asks for at "
                    f"{schedule.place(step, units[feature])}; add the plan again"
                )


def _asked(schedule: Schedule, units: Sequence[int], features: _Features) -> list[list[float]]:
    """Compute what each feature, of one of these units, is at each step of the schedule."""
    histories: list[list[float]] = [[] for _ in units]
    asked = []
    for step, rows in enumerate(schedule.coefficients):
        used = []
        for feature, unit in enumerate(units):
            row, history = rows[unit], histories[feature]
            value = sum(c * h for c, h in zip(row, history, strict=False))
            used.append(value if row else features[step][feature])
            if not row or schedule.history == "used":
                histories[feature] = [used[-1], *history][:MAX_HISTORY]
        asked.append(used)
    return asked


def _planned(plan: Plan, spec: ModelSpec, features: _Features) -> list[list[float | None]]:
    """Compute the same from the plan and its slots; None for a feature that it leaves out."""
    slots = {stream: [0.0] * plan.slots_of(stream) for stream in ALL_STREAMS}
    planned: list[list[float | None]] = [[None] * len(row) for row in features]
    whole = plan.schedule.level == "residual"
    for step, launches in enumerate(plan.launches):
        for op in launches:
            if isinstance(op, Compute) and whole:
                planned[step][0] = features[step][0]
            elif isinstance(op, Compute):
                of_unit = features_of_units(spec)[op.unit]
                for (feature, stream), store in zip(of_unit, op.stores, strict=True):
                    value = planned[step][feature] = features[step][feature]
                    if store is not None:
                        slots[stream][store] = value
            elif isinstance(op, Accumulate):
                for tap in op.taps:
                    target = planned[step + tap.ahead]
                    added = tap.coefficient * slots[op.stream][op.slot]
                    target[op.feature] = (target[op.feature] or 0.0) + added
            elif isinstance(op, Residual):
                slots["image"][op.store] = features[step][0]
            elif isinstance(op, Predict):
                of_stream = slots[op.stream]
                sums = [_sum(prediction, of_stream) for prediction in op.predictions]
                for feature, (prediction, value) in enumerate(
                    zip(op.predictions, sums, strict=True), op.feature
                ):
                    planned[step + op.ahead][feature] = prediction.coefficients[0] * value
                    if prediction.store is not None:
                        of_stream[prediction.store] = value
    return planned


def _sum(prediction: Prediction, slots: Sequence[float]) -> float:
    """Compute the sum that a prediction stores, without its first coefficient, the factor."""
    if not prediction.slots:
        raise EngineDirError("a launch of the plan predicts from nothing; add the plan again")
    first, *others = (slots[slot] for slot in prediction.slots)
    return first + sum(c * v for c, v in zip(prediction.coefficients[1:], others, strict=True))
