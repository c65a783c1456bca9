"""Models with two sets of weights: no prediction reads features of the other set."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from goc_deploy.compiler import Plan, check_plan, compile_for_host, in_form
from goc_deploy.compiler.agreement import check_agreement
from goc_deploy.errors import EngineDirError, ScheduleError
from goc_deploy.policies.grammar import parse_policy
from goc_deploy.policies.resolve import schedule_from_policy
from goc_deploy.samplers import SamplerTable, sampler_table, switch_step
from goc_deploy.samplers.process import Process
from goc_deploy.schedule import COMPUTE, REUSE, Schedule, check_schedule
from goc_deploy.schedule.schedule import schedule_from_json, schedule_to_json
from goc_deploy.spec import ModelSpec
from tests.goc_deploy.strategies import residual_schedules, schedules
from tests.reference import run_plan, run_schedule, toy_feature

FLOW = "flow_to_noise"
SPEC = ModelSpec(2, 8, 2, 16, 2, 2, 4, 10, False, prediction_type=FLOW)


def table_of(steps: int) -> SamplerTable:
    return sampler_table("euler", steps, Process(FLOW))


def with_switch(spec: ModelSpec, table: SamplerTable, switch: int) -> ModelSpec:
    """A model whose second set of weights begins at a step; after the last, it never does."""
    times = [*table.timesteps, 0]
    return replace(spec, boundary=(times[switch - 1] + times[switch]) / 2000)


def compiled(text: str, switch: int, steps: int = 10) -> Plan:
    table = table_of(steps)
    schedule = schedule_from_policy(parse_policy(text), SPEC, steps)
    return compile_for_host(schedule, with_switch(SPEC, table, switch), table)


@given(schedules(max_steps=12) | residual_schedules(), st.data())
def test_every_form_of_a_plan_forgets_the_first_set(
    schedule: Schedule, data: st.DataObject
) -> None:
    table = table_of(schedule.steps)
    switch = data.draw(st.integers(1, schedule.steps))
    spec = with_switch(replace(SPEC, depth=schedule.depth), table, switch)
    plan = compile_for_host(schedule, spec, table)
    begun = plan.schedule
    assert begun.switch == (switch if switch < schedule.steps else None)
    assert begun.coefficients[:switch] == schedule.coefficients[:switch]
    assert all(row == COMPUTE for step in begun.coefficients[switch : switch + 1] for row in step)
    expected = run_schedule(begun, np.linspace(-1, 1, 5), toy_feature)  # asserts what it reads
    forms = ["device"] if schedule.level == "residual" else ["device", "sums"]
    for other in (plan, *(in_form(plan, spec, form) for form in forms)):
        check_agreement(other, spec)
        found = run_plan(other, np.linspace(-1, 1, 5), toy_feature)
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-10)
    assert compile_for_host(begun, spec, table) == plan
    assert schedule_from_json(schedule_to_json(begun).encode(), "it") == begun


@pytest.mark.parametrize(
    "text", ["fora:2", "fora:3+gc:1.0", "fora:3+lagrange:2", "fora:3+taylor:2"]
)
@pytest.mark.parametrize("switch", range(1, 10))
def test_every_policy_computes_where_the_second_set_begins(text: str, switch: int) -> None:
    schedule = compiled(text, switch).schedule
    check_schedule(schedule)
    assert set(schedule.coefficients[switch]) == {COMPUTE}
    for row in schedule.coefficients[min(switch + 1, 9)]:
        assert row in (COMPUTE, REUSE)


def test_the_boundary_is_compared_as_in_diffusers() -> None:
    table = table_of(4)  # 1000, 750, 500, 250
    at = [switch_step(table, replace(SPEC, boundary=b)) for b in (0.0, 0.2, 0.25, 0.26, 0.76)]
    assert at == [None, None, None, 3, 1]


def test_a_schedule_that_predicts_from_the_other_set_is_refused() -> None:
    table = table_of(4)
    rows = ((COMPUTE,) * 4, (REUSE,) * 4, (REUSE,) * 4, (REUSE,) * 4)
    spec = with_switch(SPEC, table, 2)
    wrong = replace(Schedule.of(spec, rows), switch=2)
    message = (
        "step 2, block 0, attn: reuse reads 1 history entries but only 0 are stored since step 2, "
        "where the second set of weights begins; compute this unit at this step"
    )
    with pytest.raises(ScheduleError, match=message):
        compile_for_host(wrong, spec, table)
    elsewhere = replace(Schedule.of(spec, ((COMPUTE,) * 4,) * 4), switch=3)
    with pytest.raises(
        ScheduleError, match="at step 3, but the model and sampler 'euler' switch at step 2"
    ):
        compile_for_host(elsewhere, spec, table)
    with pytest.raises(ScheduleError, match=r"at step 3, but the model and .* switch at no step"):
        compile_for_host(elsewhere, SPEC, table)


def test_a_plan_that_reads_across_the_switch_is_refused() -> None:
    table = table_of(4)
    rows = ((COMPUTE,) * 4, (COMPUTE,) * 4, (REUSE,) * 4, (REUSE,) * 4)
    plan = compile_for_host(Schedule.of(SPEC, rows), SPEC, table)
    with pytest.raises(EngineDirError, match="differ in the step at which a second set"):
        check_plan(plan, with_switch(SPEC, table, 2))
    for switch in (2, 3):  # in place, or ahead into an accumulator
        edited = replace(plan, schedule=replace(plan.schedule, switch=switch))
        with pytest.raises(EngineDirError, match=r"left for step|before anything is stored"):
            check_plan(edited, with_switch(SPEC, table, switch))
        device = in_form(plan, SPEC, "device")
        edited = replace(device, schedule=edited.schedule)
        with pytest.raises(EngineDirError, match="before anything is stored"):
            check_plan(edited, with_switch(SPEC, table, switch))
        sums = in_form(plan, SPEC, "sums")
        with pytest.raises(EngineDirError, match=f"left for step {switch}, where the second"):
            check_plan(replace(sums, schedule=edited.schedule), with_switch(SPEC, table, switch))


def test_a_model_of_two_sets_has_no_segments() -> None:
    table = table_of(4)
    schedule = Schedule.of(SPEC, ((COMPUTE,) * 4,) * 4)
    plan = compile_for_host(schedule, with_switch(SPEC, table, 2), table, segments="full")
    assert in_form(plan, with_switch(SPEC, table, 2), "device").segment_signatures == ()
