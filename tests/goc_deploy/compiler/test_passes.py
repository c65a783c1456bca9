from __future__ import annotations

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from goc_deploy.compiler import (
    Collect,
    Compute,
    Launch,
    Plan,
    Predict,
    Prediction,
    Segment,
    check_plan,
    compile_for_device,
    compile_for_host,
    in_form,
)
from goc_deploy.compiler.passes import accumulate_ahead, assign_slots, group_launches
from goc_deploy.compiler.plan import PlanForm
from goc_deploy.compiler.values import drop_dead, name_values
from goc_deploy.errors import EngineDirError, UsageError
from goc_deploy.options import SEGMENTS, Segments
from goc_deploy.policies.grammar import parse_policy
from goc_deploy.policies.resolve import schedule_from_policy
from goc_deploy.schedule import Schedule
from goc_deploy.spec import ModelSpec
from tests.goc_deploy.strategies import schedules
from tests.reference import run_plan, run_schedule, toy_feature

FORMS = st.sampled_from(get_args(PlanForm))


def spec_of(depth: int) -> ModelSpec:
    return ModelSpec(depth, 8, 2, 16, 2, 2, 4, 10, False)


def compiled(text: str, depth: int = 3, steps: int = 20, segments: Segments = "none") -> Plan:
    spec = spec_of(depth)
    return compile_for_host(
        schedule_from_policy(parse_policy(text), spec, steps), spec, segments=segments
    )


@given(schedules(), FORMS, st.sampled_from(SEGMENTS))
def test_a_plan_does_what_its_schedule_says(
    schedule: Schedule, form: PlanForm, segments: Segments
) -> None:
    x, spec = np.linspace(-1, 1, 5), spec_of(schedule.depth)
    plan = in_form(compile_for_host(schedule, spec, segments=segments), spec, form)
    assert plan.form == form
    np.testing.assert_allclose(
        run_plan(plan, x, toy_feature),
        run_schedule(schedule, x, toy_feature),
        rtol=1e-9,
        atol=1e-12,
    )


@given(schedules(), st.sampled_from(SEGMENTS))
def test_a_plan_takes_either_form_and_goes_back(schedule: Schedule, segments: Segments) -> None:
    spec = spec_of(schedule.depth)
    host = compile_for_host(schedule, spec, name="both", segments=segments)
    device = compile_for_device(schedule, spec, name="both", segments=segments)
    assert in_form(host, spec, "device") == device
    assert in_form(device, spec, "host") == host


def with_predictions_apart(plan: Plan) -> Plan:
    """The same plan with a launch for every prediction."""

    def apart(op: Launch) -> list[Launch]:
        if not isinstance(op, Predict):
            return [op]
        return [Predict(op.feature + i, (p,), op.ahead) for i, p in enumerate(op.predictions)]

    launches = tuple(tuple(one for op in step for one in apart(op)) for step in plan.launches)
    return replace(plan, launches=launches)


@given(schedules(), FORMS)
def test_predicting_neighbours_in_one_launch_changes_no_output(
    schedule: Schedule, form: PlanForm
) -> None:
    x, spec = np.linspace(-1, 1, 5), spec_of(schedule.depth)
    together = in_form(compile_for_host(schedule, spec), spec, form)
    apart = with_predictions_apart(together)
    check_plan(apart, spec)
    np.testing.assert_allclose(
        run_plan(together, x, toy_feature), run_plan(apart, x, toy_feature), rtol=1e-12
    )


@given(schedules())
def test_predicting_ahead_changes_no_output(schedule: Schedule) -> None:
    x, spec = np.linspace(-1, 1, 5), spec_of(schedule.depth)
    ahead, in_place = (
        compile_for_host(schedule, spec),
        compile_for_device(schedule, spec),
    )
    assert in_place.accumulators == 0
    assert [ahead.step_kind(k) for k in range(ahead.steps)] == [
        in_place.step_kind(k) for k in range(ahead.steps)
    ]
    np.testing.assert_allclose(
        run_plan(ahead, x, toy_feature), run_plan(in_place, x, toy_feature), rtol=1e-9, atol=1e-12
    )


@given(schedules(), st.booleans())
def test_no_two_live_values_share_a_slot(schedule: Schedule, eager: bool) -> None:
    spec = spec_of(schedule.depth)
    evaluations = drop_dead(name_values(schedule, spec), spec)
    groups = group_launches(accumulate_ahead(evaluations) if eager else evaluations)
    launches, slots = assign_slots(groups)
    ops = [op for step in launches for op in step if not isinstance(op, Collect)]
    last_read = {
        value: index for index, group in enumerate(groups) for e in group for value in e.reads
    }
    holder: dict[int, int] = {}
    for index, (group, op) in enumerate(zip(groups, ops, strict=True)):
        entries = op.predictions if isinstance(op, Predict) else (Prediction((), (), op.stores[0]),)
        for e, entry in zip(group, entries, strict=True):
            assert [holder[slot] for slot in entry.slots] == list(e.reads)
        for e, entry in zip(group, entries, strict=True):
            if entry.store is not None:
                assert 0 <= entry.store < slots["image"]
                old = holder.get(entry.store)
                readers = [other.unit for other in group if old in other.reads]
                assert (
                    old is None
                    or last_read[old] < index
                    or (last_read[old] == index and readers == [e.unit])
                )
                holder[entry.store] = e.value


@given(schedules())
def test_nothing_is_stored_that_nobody_reads(schedule: Schedule) -> None:
    spec = spec_of(schedule.depth)
    kept = drop_dead(name_values(schedule, spec), spec)
    read_later: set[int] = set()
    for e in reversed(kept):
        assert e.value is None or e.value in read_later
        read_later.update(e.reads)


def test_on_a_gpu_a_step_that_computes_nothing_is_one_launch_of_at_most_88_units() -> None:
    plan = compiled("fora:2+gc:1.2", depth=50)
    stacked = in_form(plan, spec_of(50), "device")
    sizes = [len(op.predictions) for op in stacked.launches[3] if isinstance(op, Predict)]
    assert sizes == [88, 12]
    assert (stacked.name, stacked.sampler, stacked.schedule) == (
        plan.name,
        plan.sampler,
        plan.schedule,
    )
    assert all(isinstance(op, Compute) for op in stacked.launches[4])


@given(schedules())
def test_segments_change_no_output_and_are_all_full_steps_by_one_engine(schedule: Schedule) -> None:
    x, spec = np.linspace(-1, 1, 5), spec_of(schedule.depth)
    plan = compile_for_host(schedule, spec, segments="full")
    merged, apart = in_form(plan, spec, "device"), compile_for_device(schedule, spec)
    assert not plan.segment_signatures
    assert len(merged.segment_signatures) == 1
    for k in range(plan.steps):
        assert merged.step_kind(k) == apart.step_kind(k) == plan.step_kind(k)
        if merged.step_kind(k) == "full":
            assert [type(op) for op in merged.launches[k]] == [Segment]
    np.testing.assert_allclose(
        run_plan(merged, x, toy_feature),
        run_schedule(schedule, x, toy_feature),
        rtol=1e-9,
        atol=1e-12,
    )


def test_full_steps_store_alike_so_that_one_engine_serves_them() -> None:
    merged = in_form(compiled("fora:2@0.5+gc:1.2", segments="full"), spec_of(3), "device")
    apart = in_form(compiled("fora:2@0.5+gc:1.2"), spec_of(3), "device")
    assert {op.stores for op in apart.launches[12]} == {(None,)}
    (op,) = merged.launches[12]
    assert isinstance(op, Segment)
    assert op.signature == "w*6"
    assert merged.slots == apart.slots  # what nobody reads is put where nothing lies
    none = in_form(compiled("none", segments="full"), spec_of(3), "device")
    assert none.segment_signatures == ("-*6",)


def test_mixed_steps_are_run_unit_by_unit() -> None:
    reuse = ((1.0,), (1.0,), (), (1.0,))
    schedule = Schedule(2, ("attn", "mlp"), (((),) * 4, reuse, ((),) * 4))
    plan = compile_for_device(schedule, spec_of(2), segments="full")
    assert [[type(op).__name__ for op in step] for step in plan.launches] == [
        ["Segment"],
        ["Predict", "Compute", "Predict"],
        ["Segment"],
    ]
    assert plan.segment_signatures == ("w*2 -*1 w*1",)


def test_unknown_segments_are_refused() -> None:
    with pytest.raises(UsageError, match="segments must be full or none, got 'all'"):
        compiled("none", segments="all")


def test_a_plan_without_caching_stores_nothing() -> None:
    plan = compiled("none")
    assert plan.slots == 0
    assert plan.kind_counts == {"full": 20}


def test_plain_reuse_needs_three_slots_and_the_gradient_one_per_unit_more() -> None:
    plain, gradient = compiled("fora:2"), compiled("fora:2+gc:1.2")
    assert (plain.slots, plain.accumulators, plain.cache_features) == (3, 1, 5)
    assert (gradient.slots, gradient.accumulators, gradient.cache_features) == (9, 1, 11)


def test_predicting_in_the_step_itself_keeps_a_slot_per_feature() -> None:
    spec = spec_of(3)
    for text, slots in (("fora:2", 6), ("fora:2+gc:1.2", 12)):
        plan = compile_for_device(schedule_from_policy(parse_policy(text), spec, 20), spec)
        assert (plan.slots, plan.accumulators, plan.cache_features) == (slots, 0, slots)
        assert all(len(plan.launches[k]) == 1 for k in range(1, 20, 2))


def test_a_step_that_computes_nothing_only_collects() -> None:
    plan = compiled("fora:2+gc:1.2")
    assert plan.kind_counts == {"full": 10, "collapsed": 10}
    assert all(plan.launches[k] == (Collect(1),) for k in range(1, 20, 2))
    assert plan.signatures == ("1*3", "2*3", "2w*3")


def test_several_steps_in_a_row_are_predicted_ahead_into_one_accumulator_each() -> None:
    plan = compiled("fora:4+gc:0.5")
    assert plan.accumulators == 3
    assert [plan.launches[k] for k in (1, 2, 3)] == [(Collect(1),), (Collect(2),), (Collect(3),)]
    assert [op.ahead for op in plan.launches[0] if isinstance(op, Predict)] == [1, 2, 3] * 2


def test_units_predicted_together_are_predicted_ahead_together() -> None:
    mixed = ((1.0,), (1.0,), (), ())
    plan = compile_for_host(
        Schedule(2, ("attn", "mlp"), (((),) * 4, mixed, ((1.0,),) * 4)), spec_of(2)
    )
    found = [
        (
            type(op).__name__,
            getattr(op, "unit", getattr(op, "feature", None)),
            getattr(op, "ahead", None),
            len(getattr(op, "predictions", ())),
        )
        for op in plan.launches[1]
    ]
    assert found == [
        ("Predict", 0, 0, 2),
        ("Compute", 2, None, 0),
        ("Compute", 3, None, 0),
        ("Predict", 0, 1, 4),
    ]


def test_stores_end_where_caching_ends() -> None:
    plan = compiled("fora:2@0.5")
    stored = [
        k
        for k, step in enumerate(plan.launches)
        if any(isinstance(op, Compute) and op.stores != (None,) for op in step)
    ]
    assert stored == [0, 2, 4, 6, 8]


def test_a_mixed_step_predicts_neighbours_together() -> None:
    reuse = ((1.0,), (1.0,), (), (1.0,))
    plan = compile_for_host(Schedule(2, ("attn", "mlp"), (((),) * 4, reuse)), spec_of(2))
    assert [
        (type(op).__name__, op.unit if isinstance(op, Compute) else op.feature)
        for op in plan.launches[1]
    ] == [
        ("Predict", 0),
        ("Compute", 2),
        ("Predict", 3),
    ]
    assert plan.step_kind(1) == "mixed"


KEPT_0, NONE_0, NONE_1 = Compute(0, (0,)), Compute(0, (None,)), Compute(1, (None,))
REUSE_AHEAD = Predict(0, (Prediction((0,), (1.0,), None),), 1)


@pytest.mark.parametrize(
    ("launches", "slots", "message"),
    [
        (((Compute(0, (5,)), NONE_1),), 1, "slot outside 0..0"),
        (((Segment((0, 1)),),), 1, "slot outside 0..0"),
        (((Segment((0, 0)),),), 1, "overwrites slot 0"),
        (((Segment((None,)),),), 0, "1 slots for the 2 features"),
        (((NONE_1, NONE_0),), 0, "in order"),
        (
            ((NONE_0, Predict(1, (Prediction((0,), (1.0,), None),))),),
            1,
            "before anything is stored",
        ),
        (
            (
                (KEPT_0, Compute(1, (1,))),
                (Predict(0, (Prediction((0,), (1.0,), 1), Prediction((1,), (1.0,), None))),),
            ),
            2,
            "overwrites slot 1",
        ),
        (
            ((NONE_0, NONE_1), (Collect(1),)),
            0,
            "step 1 adds an accumulator that does not hold",
        ),
        (
            ((NONE_0, NONE_1), (Collect(2),)),
            0,
            "step 1 adds an accumulator that does not hold",
        ),
        (
            ((NONE_0, NONE_1), (Collect(0),)),
            0,
            "step 1 adds an accumulator that does not hold",
        ),
        (
            ((KEPT_0, REUSE_AHEAD, NONE_1), (Collect(1),)),
            1,
            "does not hold each of the 2 units once",
        ),
        (
            ((KEPT_0, REUSE_AHEAD, REUSE_AHEAD, NONE_1), (Collect(1),)),
            1,
            "does not hold each of the 2 units once",
        ),
        (
            (
                (KEPT_0, REUSE_AHEAD, NONE_1),
                (NONE_0, NONE_1),
            ),
            1,
            "accumulated for step 1 is never added",
        ),
        (
            ((KEPT_0, REUSE_AHEAD, NONE_1),),
            1,
            "predicts for step 1, which does not exist",
        ),
        (
            (
                (
                    KEPT_0,
                    Predict(0, (Prediction((0,), (1.0,), None),), -1),
                    NONE_1,
                ),
            ),
            1,
            "predicts for step -1, which does not exist",
        ),
    ],
)
def test_a_plan_that_would_run_into_foreign_memory_is_refused(
    launches: tuple, slots: int, message: str
) -> None:
    good = compile_for_host(Schedule(1, ("attn", "mlp"), (((), ()),) * len(launches)), spec_of(1))
    bad = Plan("bad", good.sampler, launches, slots, good.schedule)
    with pytest.raises(EngineDirError, match=message):
        check_plan(bad, spec_of(1))


@pytest.mark.parametrize("slots", [7, 10**12])
def test_a_plan_that_asks_for_slots_that_it_does_not_use_is_refused(slots: int) -> None:
    spec = ModelSpec(3, 8, 2, 16, 2, 2, 4, 10, False)
    schedule = schedule_from_policy(parse_policy("fora:2"), spec, 6)
    plan = replace(compile_for_host(schedule, spec), slots=slots)
    with pytest.raises(EngineDirError, match=f"asks for {slots} slots but stores into 3"):
        check_plan(plan, spec)
