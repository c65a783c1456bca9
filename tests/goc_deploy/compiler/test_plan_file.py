"""Plans as files."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from goc_deploy.compiler import Plan, check_plan, compile_schedule
from goc_deploy.compiler.plan_file import PLAN_VERSION, plan_from_json, plan_to_json
from goc_deploy.errors import EngineDirError, GocError
from goc_deploy.options import SEGMENTS
from goc_deploy.schedule import Schedule, gradient
from goc_deploy.spec import DIFFUSION_PREDICTION_TYPES, ModelSpec
from tests.fuzz.mutations import mutated_value
from tests.goc_deploy.strategies import schedules

C, R, G = (), (1.0,), gradient(0.5)
SCHEDULE = Schedule(2, ("attn", "mlp"), ((C,) * 4, (C,) * 4, (G, R, C, C), (R,) * 4, (C,) * 4))


def spec_of(schedule: Schedule, prediction: str = "eps") -> ModelSpec:
    return ModelSpec(schedule.depth, 8, 2, 16, 2, 2, 4, 10, True, prediction_type=prediction)


def plan_of(
    schedule: Schedule, sampler: str = "ddim", prediction: str = "eps", segments: str = "none"
) -> Plan:
    return compile_schedule(schedule, spec_of(schedule, prediction), sampler, segments=segments)


def fields() -> dict[str, Any]:
    """A sound plan file with launches of every kind."""
    found: dict[str, Any] = json.loads(plan_to_json(plan_of(SCHEDULE)))
    assert {launch[0] for step in found["launches"] for launch in step} == {"c", "p", "a"}
    return found


def read(found: Any) -> Plan:
    return plan_from_json(json.dumps(found).encode(), SCHEDULE, "p.json")


@given(
    schedules(),
    st.sampled_from(["ddim:0.3", "dpm++", "dpm++:3@leading", "ddpm"]),
    st.sampled_from(DIFFUSION_PREDICTION_TYPES),
    st.sampled_from(SEGMENTS),
)
def test_saving_and_loading_a_plan_is_the_identity(
    schedule: Schedule, sampler: str, prediction: str, segments: str
) -> None:
    plan = plan_of(schedule, sampler, prediction, segments)
    text = plan_to_json(plan)
    loaded = plan_from_json(text.encode(), schedule, "plan")
    assert loaded == plan
    assert plan_to_json(loaded) == text


@pytest.mark.parametrize("version", range(PLAN_VERSION))
def test_plans_of_an_older_version_ask_for_a_new_export(version: int) -> None:
    message = (
        f"plan has format version {version}, this goc_deploy reads {PLAN_VERSION}; export again"
    )
    with pytest.raises(EngineDirError, match=message):
        plan_from_json(json.dumps({**fields(), "version": version}).encode(), SCHEDULE, "plan")


def test_a_plan_file_without_segments_or_start_has_none_and_starts_from_the_noise() -> None:
    found = fields()
    del found["segments"]
    assert "start" not in found["sampler"]
    assert read(found) == plan_of(SCHEDULE)


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "segments": (
        lambda p: p.update(segments="all"),
        "$.segments: expected full or none, got 'all'",
    ),
    "slots": (lambda p: p.update(slots=2.9), "$.slots: expected int, got 2.9"),
    "negative": (lambda p: p.update(slots=-1), "$.slots: expected int >= 0, got -1"),
    "name": (lambda p: p.pop("name"), "$.name: required field is missing"),
    "sampler": (
        lambda p: p["sampler"].update(latent=[1.0, "x"]),
        "$.sampler.latent[1]: expected float, got 'x'",
    ),
    "estimate": (
        lambda p: p["sampler"]["estimate"].__setitem__(1, [1.0]),
        "$.sampler.estimate[1]: expected array of length 2, got 1",
    ),
    "launch": (
        lambda p: p["launches"][0].__setitem__(0, ["x", 0, None]),
        "$.launches[0][0][0]: invalid value 'x'",
    ),
    "unit": (
        lambda p: p["launches"][0][0].__setitem__(1, -1),
        "$.launches[0][0][1]: expected int >= 0, got -1",
    ),
    "more": (
        lambda p: p["launches"][0][0].append(1),
        "$.launches[0][0]: expected array of at most length",  # msgspec does not count the tag
    ),
    "no launch": (
        lambda p: p["launches"][0].__setitem__(0, 5),
        "$.launches[0][0]: expected array, got 5",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_wrong_field_is_named_with_its_path(change: str) -> None:
    alter, message = CHANGES[change]
    found = fields()
    alter(found)
    with pytest.raises(EngineDirError) as caught:
        read(found)
    assert str(caught.value).startswith(f"p.json: {message}")


def test_mutated_plans_are_read_or_refused() -> None:
    sound, generator = fields(), random.Random(0)
    for _ in range(1500):
        with contextlib.suppress(GocError):
            check_plan(read(mutated_value(sound, generator)), spec_of(SCHEDULE))
