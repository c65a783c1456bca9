"""Schedules that predict the residual of whole steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from goc_deploy.compiler import (
    Compute,
    Plan,
    Predict,
    Prediction,
    Residual,
    Segment,
    check_plan,
    compile_for_host,
    in_form,
)
from goc_deploy.compiler.agreement import check_agreement
from goc_deploy.compiler.plan import PlanForm
from goc_deploy.compiler.plan_file import plan_from_json, plan_to_json
from goc_deploy.errors import EngineDirError
from goc_deploy.options import SEGMENTS, Segments
from goc_deploy.policies.grammar import parse_policy
from goc_deploy.policies.resolve import schedule_from_policy
from goc_deploy.schedule import Schedule
from goc_deploy.spec import ModelSpec
from tests.goc_deploy.strategies import residual_schedules
from tests.reference import run_plan, run_schedule, toy_feature

FORMS = st.sampled_from(["host", "device"])


def spec_of(depth: int) -> ModelSpec:
    return ModelSpec(depth, 8, 2, 16, 2, 2, 4, 10, False)


def compiled(text: str, depth: int = 3, segments: Segments = "none") -> Plan:
    spec = spec_of(depth)
    schedule = schedule_from_policy(parse_policy(text), spec, 20)
    return compile_for_host(schedule, spec, segments=segments)


@given(residual_schedules(), FORMS, st.sampled_from(SEGMENTS))
def test_a_plan_does_what_its_schedule_says(
    schedule: Schedule, form: PlanForm, segments: Segments
) -> None:
    x, spec = np.linspace(-1, 1, 5), spec_of(schedule.depth)
    host = compile_for_host(schedule, spec, segments=segments)
    check_agreement(host, spec)
    plan = in_form(host, spec, form)
    check_plan(plan, spec)
    np.testing.assert_allclose(
        run_plan(plan, x, toy_feature),
        run_schedule(schedule, x, toy_feature),
        rtol=1e-9,
        atol=1e-12,
    )
    assert in_form(plan, spec, "host") == host


@given(residual_schedules(), st.sampled_from(SEGMENTS))
def test_saving_and_loading_a_plan_is_the_identity(schedule: Schedule, segments: Segments) -> None:
    plan = compile_for_host(schedule, spec_of(schedule.depth), segments=segments)
    text = plan_to_json(plan)
    assert plan_from_json(text.encode(), schedule, "plan") == plan


def test_a_collapsed_step_is_one_launch_and_only_residuals_that_are_read_are_kept() -> None:
    plan = compiled("fora:2@0.5+lagrange:2,level=residual")
    assert plan.kind_counts == {"collapsed": 5, "full": 15}
    assert plan.signatures == ("1*1", "2*1", "3*1")
    kept = [k for k, step in enumerate(plan.launches) if isinstance(step[-1], Residual)]
    assert kept == [0, 2, 4, 6, 8]
    assert all(isinstance(op, Predict) and op.feature == 0 for (op,) in plan.launches[1:10:2])
    assert [op.stores for op in plan.launches[0] if isinstance(op, Compute)] == [(None,)] * 6
    assert not compiled("none,level=residual").keeps_residuals


def test_every_full_step_is_the_same_segment() -> None:
    plan = in_form(compiled("fora:2+gc,level=residual", segments="full"), spec_of(3), "device")
    assert plan.segment_signatures == ("-*6",)
    assert [type(op) for op in plan.launches[4]] == [Segment, Residual]
    assert plan.step_kind(4) == "full"


@pytest.mark.parametrize("depth", [3, 28])
@pytest.mark.parametrize(
    ("correction", "slots"), [("", 1), ("+gc:1.2", 2), ("+lagrange:1", 2), ("+lagrange:2", 3)]
)
def test_the_cache_does_not_grow_with_the_depth(correction: str, slots: int, depth: int) -> None:
    plan = compiled(f"fora:2{correction},level=residual", depth)
    assert (plan.slots, plan.accumulators) == (slots, 0)
    assert plan.cache_features == slots + 1  # the tokens before all units
    assert in_form(plan, spec_of(depth), "device").cache_features == slots + 1


UNITS = (Compute(0, (None,)), Compute(1, (None,)))
REUSE = Prediction((0,), (1.0,), None)


@pytest.mark.parametrize(
    ("launches", "level", "message"),
    [
        (((Residual(0), *UNITS),), "residual", "keeps the residual before it has run every unit"),
        (((UNITS[0], Residual(0), UNITS[1]),), "residual", "before it has run every unit"),
        (((*UNITS, Residual(0)),), "unit", "its schedule predicts by unit"),
        (((*UNITS, Residual(1)),), "residual", r"slot outside 0\.\.0"),
        (((Compute(0, (0,)), UNITS[1]),), "residual", "stores features, but its schedule predicts"),
        (((Segment((None, 0)),),), "residual", "stores features, but its schedule predicts"),
        (((Predict(0, (REUSE,)),),), "residual", "before anything is stored"),
        (
            ((*UNITS, Residual(0)), (Predict(0, (REUSE, REUSE)),)),
            "residual",
            "step 1 must predict the residual, once and in the step itself",
        ),
        (((*UNITS, Residual(0)), (Predict(1, (REUSE,)),)), "residual", "once and in the step"),
        (
            ((*UNITS, Residual(0), Predict(0, (REUSE,), 1)), UNITS),
            "residual",
            "step 0 must predict the residual, once and in the step itself",
        ),
        (((*UNITS, Residual(0)), (*UNITS, Predict(0, (REUSE,)))), "residual", "in order"),
        (((*UNITS, Residual(0)), (Predict(0, (REUSE,)), *UNITS)), "residual", "in order"),
    ],
)
def test_a_plan_that_mixes_units_and_residuals_is_refused(
    launches: tuple[tuple[Any, ...], ...], level: Any, message: str
) -> None:
    schedule = Schedule(1, ("attn", "mlp"), (((), ()),) * len(launches), level=level)
    good = compile_for_host(schedule, spec_of(1))
    with pytest.raises(EngineDirError, match=message):
        check_plan(Plan("bad", good.sampler, launches, 1, schedule), spec_of(1))


def test_a_plan_for_another_level_or_other_coefficients_is_noticed() -> None:
    plan = compiled("fora:2+lagrange:1,level=residual")
    (op,) = plan.launches[3]
    assert isinstance(op, Predict)
    (prediction,) = op.predictions
    other = replace(prediction, coefficients=(1.4, *prediction.coefficients[1:]))
    launches = (*plan.launches[:3], (Predict(0, (other,)),), *plan.launches[4:])
    with pytest.raises(EngineDirError, match="does not do what its schedule asks for at step 3"):
        check_agreement(replace(plan, launches=launches), spec_of(3))
