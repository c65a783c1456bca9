from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import get_args

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from goc_deploy.compiler import Plan, Predict, Prediction, compile_schedule, in_form
from goc_deploy.compiler.agreement import check_agreement
from goc_deploy.compiler.plan import PlanForm
from goc_deploy.errors import EngineDirError
from goc_deploy.policies.grammar import parse_policy
from goc_deploy.policies.resolve import schedule_from_policy
from goc_deploy.schedule import Schedule
from goc_deploy.spec import ModelSpec
from tests.goc_deploy.strategies import schedules


def spec_of(depth: int) -> ModelSpec:
    return ModelSpec(depth, 8, 2, 16, 2, 2, 4, 10, False)


def changed(plan: Plan, number: int, change: Callable[[Prediction], Prediction]) -> Plan:
    """A plan with one of its predictions changed."""
    launches, count = [], 0
    for step in plan.launches:
        ops = []
        for op in step:
            if isinstance(op, Predict):
                kept = []
                for prediction in op.predictions:
                    kept.append(change(prediction) if count == number else prediction)
                    count += 1
                op = replace(op, predictions=tuple(kept))
            ops.append(op)
        launches.append(tuple(ops))
    return replace(plan, launches=tuple(launches))


def predictions(plan: Plan) -> list[Prediction]:
    ops = [op for step in plan.launches for op in step if isinstance(op, Predict)]
    return [prediction for op in ops for prediction in op.predictions]


@given(schedules(), st.sampled_from(get_args(PlanForm)))
def test_what_the_compiler_makes_agrees(schedule: Schedule, form: PlanForm) -> None:
    spec = spec_of(schedule.depth)
    check_agreement(in_form(compile_schedule(schedule, spec), spec, form), spec)


@given(schedules(), st.integers(0, 10**6), st.integers(0, 3))
def test_any_other_coefficient_is_noticed(schedule: Schedule, which: int, place: int) -> None:
    spec = spec_of(schedule.depth)
    plan = compile_schedule(schedule, spec)
    count = len(predictions(plan))
    assume(count)

    def larger(prediction: Prediction) -> Prediction:
        found = list(prediction.coefficients)
        found[place % len(found)] += 0.01
        return replace(prediction, coefficients=tuple(found))

    with pytest.raises(EngineDirError, match=r"does not do what its schedule asks for at step \d"):
        check_agreement(changed(plan, which % count, larger), spec)


def test_a_prediction_from_nothing_or_from_another_unit_is_noticed() -> None:
    spec = spec_of(2)
    schedule = schedule_from_policy(parse_policy("fora:2+gc:1.2"), spec, 6)
    plan = compile_schedule(schedule, spec)
    slots = {slot for prediction in predictions(plan) for slot in prediction.slots}
    assert len(slots) > 1

    def elsewhere(prediction: Prediction) -> Prediction:
        other = next(slot for slot in sorted(slots) if slot not in prediction.slots)
        return replace(prediction, slots=(other, *prediction.slots[1:]))

    with pytest.raises(EngineDirError, match="does not do what its schedule asks for"):
        check_agreement(changed(plan, 5, elsewhere), spec)
    nothing = changed(plan, 0, lambda p: replace(p, slots=(), coefficients=()))
    with pytest.raises(EngineDirError, match="predicts from nothing"):
        check_agreement(nothing, spec)


def test_a_plan_for_another_schedule_is_noticed() -> None:
    spec = spec_of(2)
    one, other = (
        schedule_from_policy(parse_policy(text), spec, 6) for text in ("fora:2", "fora:3")
    )
    with pytest.raises(EngineDirError, match="at step 2, block 0, attn; add the plan again"):
        check_agreement(replace(compile_schedule(one, spec), schedule=other), spec)
