"""Plans of models whose blocks differ and change the tokens of the text too."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from goc_deploy.blocks import (
    ALL_STREAMS,
    IMAGE_FEATURE,
    REFERENCE_FEATURE,
    STREAMS,
    TEXT_FEATURE,
    Blocks,
    Feature,
    Unit,
)
from goc_deploy.compiler import (
    Accumulate,
    AddSum,
    Compute,
    Plan,
    Predict,
    check_plan,
    compile_for_device,
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
from goc_deploy.schedule import COMPUTE, REUSE, Schedule
from goc_deploy.spec import ModelSpec
from tests.goc_deploy.strategies import schedules_of
from tests.reference import run_plan, run_schedule, toy_feature

FORMS = st.sampled_from(get_args(PlanForm))
BOTH = (IMAGE_FEATURE, TEXT_FEATURE)


def joint(branch: str, *features: Feature) -> Unit:
    return Unit(branch, features=features or BOTH, reads=STREAMS)


DUAL = joint("attn", IMAGE_FEATURE, Feature("image", "_2"), TEXT_FEATURE)
DOUBLE = Blocks(2, (joint("attn"), joint("mlp")))
LAST = Blocks(1, (joint("attn", IMAGE_FEATURE), Unit("mlp")))
FLUX_LIKE = (DOUBLE, Blocks(2, (joint("single"),)), Blocks(1, (joint("single", IMAGE_FEATURE),)))
SD3_LIKE = (Blocks(1, (DUAL, joint("mlp"))), DOUBLE, LAST)


def editing(branch: str, *features: Feature) -> Unit:
    return Unit(branch, features=features or (*BOTH, REFERENCE_FEATURE), reads=ALL_STREAMS)


EDIT_LIKE = (
    Blocks(2, (editing("attn"), editing("mlp"))),
    Blocks(1, (editing("attn", IMAGE_FEATURE), Unit("mlp"))),
)


def spec_of(blocks: tuple[Blocks, ...]) -> ModelSpec:
    references = sum("reference" in unit.reads for run in blocks for unit in run.units)
    names = dict.fromkeys(unit.branch for run in blocks for unit in run.units)
    return ModelSpec(
        sum(run.count for run in blocks),
        8,
        2,
        16,
        2,
        (3, 2),
        4,
        0,
        False,
        branches=tuple(names),
        caption_channels=3,
        caption_tokens=5,
        blocks=blocks,
        max_references=min(1, references),
    )


SPECS = [spec_of(FLUX_LIKE), spec_of(SD3_LIKE), spec_of(EDIT_LIKE)]
X = np.linspace(-1, 1, 5)


def test_features_are_numbered_stream_by_stream() -> None:
    spec = spec_of(SD3_LIKE)
    found = [(place.unit, place.feature.output) for place in spec.features]
    image = [(0, "feature"), (0, "feature_2"), *((unit, "feature") for unit in range(1, 8))]
    assert found == [*image, *((unit, "feature_text") for unit in range(6))]
    assert spec.modulation.of_unit(0) == {
        "gate": 0,
        "gate_2": 1,
        "gate_text": 9,
        "shift": 17,
        "scale": 18,
    }
    assert spec.unit_names[4:6] == ("block_02_attn", "block_02_mlp")
    assert spec_of(FLUX_LIKE).unit_names[4:] == tuple(f"block_{n:02d}_single" for n in (2, 3, 4))


@given(st.data(), FORMS, st.sampled_from(SEGMENTS))
def test_a_plan_does_what_its_schedule_says(
    data: st.DataObject, form: PlanForm, segments: Segments
) -> None:
    spec = data.draw(st.sampled_from(SPECS))
    schedule = data.draw(schedules_of(spec))
    host = compile_for_host(schedule, spec, segments=segments)
    plan = in_form(host, spec, form)
    check_agreement(host, spec)
    np.testing.assert_allclose(
        run_plan(plan, X, toy_feature, spec),
        run_schedule(schedule, X, toy_feature, spec),
        rtol=1e-9,
        atol=1e-10,
    )
    assert plan_from_json(plan_to_json(host).encode(), schedule, "plan") == host


@pytest.mark.parametrize("policy", ["fora:2+gc:0.5", "fora:3+lagrange:2", "fora:3+gc:0.5:residual"])
@pytest.mark.parametrize("compile_form", [compile_for_host, compile_for_device])
@pytest.mark.parametrize("blocks", [SD3_LIKE, EDIT_LIKE])
def test_plans_of_whole_steps_keep_the_image_only(
    policy: str, compile_form: object, blocks: tuple[Blocks, ...]
) -> None:
    spec = spec_of(blocks)
    if policy.endswith(":residual"):
        policy = "fora:3,level=residual"
    plan = compile_form(schedule_from_policy(parse_policy(policy), spec, 12), spec)
    assert plan.features_of("text") == plan.features_of("reference") == 0
    predictions = [op for step in plan.launches for op in step if isinstance(op, Predict)]
    assert {op.stream for op in predictions} == {"image"}


def partly(computed: set[int], spec: ModelSpec) -> Schedule:
    step = tuple(COMPUTE if unit in computed else REUSE for unit in range(spec.units))
    return Schedule.of(spec, ((COMPUTE,) * spec.units, step))


def test_text_is_predicted_only_before_the_last_computed_unit_that_reads_it() -> None:
    spec = spec_of(SD3_LIKE)
    plan = compile_for_device(partly({2}, spec), spec)
    assert [(type(op).__name__, getattr(op, "stream", "")) for op in plan.launches[1]] == [
        ("Predict", "image"),
        ("Predict", "text"),
        ("Compute", ""),
        ("Predict", "image"),
    ]
    assert [len(op.predictions) for op in plan.launches[1] if isinstance(op, Predict)] == [3, 2, 5]
    assert plan.text_slots == 2
    # The last MLP reads the image only.
    assert compile_for_device(partly({7}, spec), spec).text_slots == 0


def test_sums_of_the_text_are_apart_from_those_of_the_image() -> None:
    spec = spec_of(FLUX_LIKE)
    plan = in_form(compile_for_device(partly({5}, spec), spec), spec, "sums")
    assert (plan.accumulators, plan.accumulators_of("text"), plan.text_slots) == (2, 1, 1)
    assert plan.launches[1] == (
        AddSum(0, 0, 5),
        AddSum(0, 7, 5, "text"),
        Compute(5, (None, None)),
        AddSum(1, 6, 1),
    )
    added = [op.stream for op in plan.launches[0] if isinstance(op, Accumulate)]
    assert added == [*["image", "text"] * 5, "image"]


def test_the_reference_is_predicted_as_the_text_is() -> None:
    spec = spec_of(EDIT_LIKE)
    plan = compile_for_device(partly({2}, spec), spec)
    streams = [op.stream for op in plan.launches[1] if isinstance(op, Predict)]
    assert streams == [*ALL_STREAMS, "image"]
    assert (plan.slots, plan.text_slots, plan.reference_slots) == (5, 2, 2)
    tokens = 5 * spec.tokens + 2 * spec.caption_tokens + 2 * spec.tokens
    assert plan.cache_bytes(spec, 2, 4) == 2 * 4 * 8 * tokens
    broken = with_step(plan, *(op for op in plan.launches[1] if "reference" not in str(op)))
    with pytest.raises(EngineDirError, match="block_01_attn, which reads the reference, without"):
        check_plan(broken, spec)


def test_memory_counts_the_tokens_of_each_stream() -> None:
    spec = spec_of(SD3_LIKE)
    plan = compile_for_device(partly({2}, spec), spec)
    tokens = plan.slots * spec.tokens + 2 * spec.caption_tokens
    assert plan.cache_bytes(spec, 2, 4) == 2 * 4 * 8 * tokens
    assert plan.naive_cache_bytes(spec, 2, 4) == 2 * 2 * 4 * 8 * (9 * 6 + 6 * 5)


def with_step(plan: Plan, *ops: object) -> Plan:
    return replace(plan, launches=(plan.launches[0], ops))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ops: (ops[0], *ops[2:]), "computes block_01_attn, which reads the text, without"),
        (lambda ops: (ops[0], replace(ops[1], feature=10), *ops[2:]), "block_01_attn, which reads"),
        (lambda ops: (ops[0], replace(ops[1], stream="image"), *ops[2:]), "of the image, which"),
        (lambda ops: (ops[0], replace(ops[1], feature=14), *ops[2:]), "of the text, which the"),
        (lambda ops: (*ops[:2], Compute(2, (None,)), ops[3]), "1 slots for the 2 features"),
        (lambda ops: (*ops[:2], Compute(2, (None, 2)), ops[3]), "slot outside 0..1"),
        (lambda ops: (*ops[:2], Compute(9, (None, None)), ops[3]), "2 slots for the 0 features"),
    ],
)
def test_a_plan_that_breaks_the_text_is_refused(change: object, message: str) -> None:
    spec = spec_of(SD3_LIKE)
    plan = compile_for_device(partly({2}, spec), spec)
    with pytest.raises(EngineDirError, match=message):
        check_plan(with_step(plan, *change(plan.launches[1])), spec)
