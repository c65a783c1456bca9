"""The form ``sums``: its passes, its memory, and what its check refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from goc_deploy.compiler import (
    Accumulate,
    AddSum,
    Collect,
    Compute,
    Launch,
    Plan,
    Predict,
    Tap,
    check_plan,
    compile_for_host,
    compile_to_sums,
    in_form,
)
from goc_deploy.compiler.agreement import check_agreement
from goc_deploy.compiler.plan import MAX_TAPS
from goc_deploy.compiler.sums import expand_history, push_features
from goc_deploy.compiler.values import name_values
from goc_deploy.errors import EngineDirError, UsageError
from goc_deploy.policies.grammar import parse_policy
from goc_deploy.policies.resolve import schedule_from_policy
from goc_deploy.schedule import Schedule, gradient
from goc_deploy.spec import ModelSpec
from tests.goc_deploy.strategies import residual_schedules, schedules
from tests.reference import gate, run_plan, run_schedule, toy_feature


def spec_of(depth: int) -> ModelSpec:
    return ModelSpec(depth, 8, 2, 16, 2, 2, 4, 10, False)


def compiled(text: str, depth: int = 3, steps: int = 20) -> Plan:
    spec = spec_of(depth)
    return compile_to_sums(schedule_from_policy(parse_policy(text), spec, steps), spec)


def taps(plan: Plan, step: int) -> list[Tap]:
    return [tap for op in plan.launches[step] if isinstance(op, Accumulate) for tap in op.taps]


@given(schedules(max_steps=14))
def test_sums_do_what_a_history_per_unit_does(schedule: Schedule) -> None:
    x, spec = np.linspace(-1, 1, 5), spec_of(schedule.depth)
    host = compile_for_host(schedule, spec)
    plan = in_form(host, spec, "sums")
    check_agreement(plan, spec)
    found = run_plan(plan, x, toy_feature)
    np.testing.assert_allclose(found, run_plan(host, x, toy_feature), rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(found, run_schedule(schedule, x, toy_feature), rtol=1e-9, atol=1e-10)
    assert [plan.step_kind(k) for k in range(plan.steps)] == [
        host.step_kind(k) for k in range(plan.steps)
    ]


@given(schedules())
def test_expanding_the_history_changes_no_prediction(schedule: Schedule) -> None:
    expanded = expand_history(name_values(schedule, spec_of(schedule.depth)))
    outputs = run_schedule(schedule, np.zeros(3), lambda step, unit, _: np.full(3, step + 7 * unit))
    found, x = [], 0.0
    for e in expanded:
        assert all(not expanded[value].reads for value in e.reads)
        assert all(expanded[value].unit == e.unit for value in e.reads)
        features = [expanded[value].step + 7 * e.unit for value in e.reads]
        g = (
            sum(c * f for c, f in zip(e.coefficients, features, strict=True))
            if e.reads
            else e.step + 7 * e.unit
        )
        x += gate(e.step, e.unit) * g
        if e.unit == schedule.units - 1:
            found.append(x)
    np.testing.assert_allclose(found, [output[0] for output in outputs], rtol=1e-9, atol=1e-9)


@given(schedules())
def test_every_feature_goes_to_sums_of_later_steps(schedule: Schedule) -> None:
    events = push_features(expand_history(name_values(schedule, spec_of(schedule.depth))))
    added = [event for event in events if not hasattr(event, "weights")]
    assert len(added) == len(set(added))
    for event in events:
        for weights in getattr(event, "weights", ()):
            for target, _ in weights:
                assert target.step > event.step
                assert target.feature <= event.unit < target.feature + target.features


@pytest.mark.parametrize("interval", [2, 3, 4, 5])
@pytest.mark.parametrize(
    ("correction", "entries"),
    [("", 1), ("+gc:0.5,history=computed", 2), ("+lagrange:1", 2), ("+lagrange:2", 3)],
)
@pytest.mark.parametrize("depth", [2, 28])
def test_accumulators_are_at_most_entries_times_predicted_steps(
    interval: int, correction: str, entries: int, depth: int
) -> None:
    plan = compiled(f"fora:{interval}{correction}", depth, 30)
    assert plan.accumulators <= entries * (interval - 1)
    assert plan.slots == 1
    assert plan.cache_features == plan.accumulators + 1


def test_two_accumulators_take_turns_whatever_the_depth() -> None:
    for depth in (2, 28):
        plan = compiled("fora:2+gc:0.5,history=computed", depth)
        assert (plan.accumulators, plan.slots, plan.predicts_ahead) == (2, 1, False)
        assert plan.kind_counts == {"full": 10, "collapsed": 10}
        assert plan.launches[5] == (AddSum(plan.launches[5][0].accumulator, 0, 2 * depth),)
        kept, new = taps(plan, 4)[:2]
        assert (kept.ahead, kept.coefficient, kept.starts) == (1, 1.5, False)
        assert (new.ahead, new.coefficient, new.starts) == (3, -0.5, True)
        assert kept.accumulator != new.accumulator
        assert plan.targets(4) == (5, 7)


def test_used_history_reads_every_earlier_computed_step() -> None:
    plan = compiled("fora:2+gc:0.5")
    assert plan.accumulators == 10
    assert len({tap.accumulator for tap in taps(plan, 0)}) == 10
    # G_3 = 1.5 F_2 - 0.5 G_1, and G_1 = F_0 reuses.
    assert [tap.coefficient for tap in taps(plan, 0)][:3] == [1.0, -0.5, 0.25]
    assert plan.signatures == ("a*1", "a*2", "a*3", "a*4", "s*2", "s*4")


def test_a_mixed_step_has_a_sum_per_run_of_predicted_units() -> None:
    reuse = ((1.0,), (1.0,), (), (1.0,))
    schedule = Schedule(2, ("attn", "mlp"), (((),) * 4, reuse))
    plan = compile_to_sums(schedule, spec_of(2))
    assert plan.launches[1] == (AddSum(0, 0, 2), Compute(2, (None,)), AddSum(1, 3, 1))
    assert [op.stores for op in plan.launches[0] if isinstance(op, Compute)] == [
        (store,) for store in (0, 0, None, 0)
    ]
    assert plan.step_kind(1) == "mixed"


def test_a_plan_without_caching_has_neither_slots_nor_accumulators() -> None:
    plan = compiled("none")
    assert (plan.slots, plan.accumulators, plan.cache_features, plan.signatures) == (0, 0, 0, ())


@given(residual_schedules())
def test_a_predicted_residual_is_refused(schedule: Schedule) -> None:
    spec = spec_of(schedule.depth)
    with pytest.raises(UsageError, match="predicts the residual of all units"):
        in_form(compile_for_host(schedule, spec), spec, "sums")


SCHEDULE = Schedule(1, ("attn", "mlp"), (((), ()), ((), ()), (gradient(0.5),) * 2, ((1.0,),) * 2))
NOT_KEPT = Compute(1, (None,))
GOOD = compile_to_sums(replace(SCHEDULE, history="computed"), spec_of(1))


def with_taps(change: Callable[[Tap], Tap], step: int, unit: int) -> Plan:
    """The good plan with the taps of one unit changed."""

    def changed(op: Launch) -> Launch:
        if not isinstance(op, Accumulate) or op.feature != unit:
            return op
        return replace(op, taps=tuple(map(change, op.taps)))

    launches = list(GOOD.launches)
    launches[step] = tuple(map(changed, launches[step]))
    return replace(GOOD, launches=tuple(launches))


def with_step(step: int, *ops: Launch) -> Plan:
    launches = list(GOOD.launches)
    launches[step] = ops
    return replace(GOOD, launches=tuple(launches))


def test_the_good_plan_is_what_the_broken_ones_are_made_of() -> None:
    check_plan(GOOD, spec_of(1))
    check_agreement(GOOD, spec_of(1))
    tap = Tap(0, 2, -0.5, starts=True)
    assert GOOD.launches == (
        (
            Compute(0, (0,)),
            Accumulate(0, 0, (tap,)),
            Compute(1, (0,)),
            Accumulate(1, 0, (replace(tap, starts=False),)),
        ),
        (
            Compute(0, (0,)),
            Accumulate(0, 0, (Tap(0, 1, 1.5, False), Tap(1, 2, 1.0, True))),
            Compute(1, (0,)),
            Accumulate(1, 0, (Tap(0, 1, 1.5, False), Tap(1, 2, 1.0, False))),
        ),
        (AddSum(0, 0, 2),),
        (AddSum(1, 0, 2),),
    )


BROKEN: dict[str, tuple[Plan, str]] = {
    "added before all units are in": (
        with_step(1, Compute(0, (0,)), *GOOD.launches[1][1:2], AddSum(1, 1, 1)),
        "step 1 adds accumulator 1, which does not hold features 1 to 1 of this step",
    ),
    "a unit is missing": (
        with_step(
            1, *GOOD.launches[1][:2], Compute(1, (0,)), Accumulate(1, 0, (Tap(0, 1, 1.5, 0),))
        ),
        "step 3 adds accumulator 1, which does not hold features 0 to 1 of this step",
    ),
    "the gate of another step": (
        with_taps(lambda tap: replace(tap, ahead=3 - tap.ahead), 1, 1),
        "step 1, feature 1 uses the gate of step 3 in accumulator 0, which step 2 adds",
    ),
    "the gate of a step that does not exist": (
        with_taps(lambda tap: replace(tap, ahead=3), 1, 1),
        "step 1, feature 1 predicts for step 4, which does not exist",
    ),
    "the gate of the same step": (
        with_taps(lambda tap: replace(tap, ahead=0), 1, 1),
        "predicts for step 1, which does not exist",
    ),
    "started twice": (
        with_taps(lambda tap: replace(tap, starts=True), 1, 1),
        "step 1, feature 1 starts accumulator 0 over, which step 2 adds",
    ),
    "never started": (
        with_taps(lambda tap: replace(tap, starts=False), 0, 0),
        "step 0, feature 0 adds to accumulator 0, which is empty",
    ),
    "taps out of order": (
        with_taps(lambda tap: replace(tap, starts=tap.ahead == 1), 1, 0),
        "those that start an accumulator last",
    ),
    "too many taps": (
        with_step(0, Compute(0, (0,)), Accumulate(0, 0, (Tap(0, 2, 1.0, True),) * (MAX_TAPS + 1))),
        f"has {MAX_TAPS + 1} taps; a launch has 1 to {MAX_TAPS}",
    ),
    "another unit's feature": (
        with_step(0, Compute(0, (0,)), NOT_KEPT, Accumulate(1, 0, (Tap(0, 2, 1.0, True),))),
        "step 0, feature 1 accumulates slot 0, which has another feature",
    ),
    "an earlier feature": (
        with_step(1, Compute(0, (None,)), Accumulate(0, 0, (Tap(0, 1, 1.5, False),))),
        "step 1, feature 0 accumulates slot 0, which has another feature",
    ),
    "added twice": (
        with_step(3, AddSum(0, 0, 2)),
        "step 3 adds accumulator 0, which does not hold features 0 to 1",
    ),
    "never added": (
        with_step(3, Compute(0, (0,)), Compute(1, (0,))),
        "accumulator 1 for step 3 is never added",
    ),
    "a launch of the host's form": (
        with_step(3, Collect(1)),
        "step 3 launches Collect, which a plan of the form sums does not have",
    ),
    "the form": (
        replace(GOOD, form="host"),
        "step 0 launches Accumulate, which a plan of the form host does not have",
    ),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_plan_is_refused(broken: str) -> None:
    plan, message = BROKEN[broken]
    with pytest.raises(EngineDirError, match=message):
        check_plan(plan, spec_of(1))


@given(schedules(), st.integers(0, 10**6))
def test_any_other_coefficient_is_noticed(schedule: Schedule, which: int) -> None:
    plan = compile_to_sums(schedule, spec_of(schedule.depth))
    places = [
        (step, index, number)
        for step, ops in enumerate(plan.launches)
        for index, op in enumerate(ops)
        if isinstance(op, Accumulate)
        for number in range(len(op.taps))
    ]
    if not places:
        assert not any(isinstance(op, Predict) for ops in plan.launches for op in ops)
        return
    step, index, number = places[which % len(places)]
    ops = list(plan.launches[step])
    op = ops[index]
    changed = list(op.taps)
    changed[number] = replace(changed[number], coefficient=changed[number].coefficient + 0.01)
    ops[index] = replace(op, taps=tuple(changed))
    launches = (*plan.launches[:step], tuple(ops), *plan.launches[step + 1 :])
    with pytest.raises(EngineDirError, match="does not do what its schedule asks for"):
        check_agreement(replace(plan, launches=launches), spec_of(schedule.depth))
