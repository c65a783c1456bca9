"""Plans and manifests on disk."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from goc_deploy.errors import EngineDirError
from goc_deploy.manifest import MANIFEST_VERSION, manifest_from_json
from goc_deploy.passes import compile_schedule
from goc_deploy.plan import SEGMENTS, Plan
from goc_deploy.serde import PLAN_VERSION, plan_from_json, plan_to_json
from goc_deploy.spec import DIFFUSION_PREDICTIONS, ModelSpec
from tests.goc_deploy.strategies import schedules


def plan_of(schedule, sampler: str = "ddim", prediction: str = "eps", segments: str = "none") -> Plan:
    spec = ModelSpec(schedule.depth, 8, 2, 16, 2, 2, 4, 10, True, prediction=prediction)
    return compile_schedule(schedule, spec, sampler, segments=segments)


@given(
    schedules(),
    st.sampled_from(["ddim:0.3", "dpm++", "dpm++:3@leading", "ddpm"]),
    st.sampled_from(DIFFUSION_PREDICTIONS),
    st.sampled_from(SEGMENTS),
)
def test_plans_survive_their_json_form(schedule, sampler: str, prediction: str, segments: str) -> None:
    plan = plan_of(schedule, sampler, prediction, segments)
    assert plan_from_json(plan_to_json(plan).encode(), schedule, "plan") == plan


@given(schedules(max_steps=3), st.integers(0, PLAN_VERSION - 1))
def test_plans_of_an_older_version_ask_for_a_new_export(schedule, version: int) -> None:
    old = json.loads(plan_to_json(plan_of(schedule))) | {"version": version}
    message = f"plan has format version {version}, this goc_deploy reads {PLAN_VERSION}; export again"
    with pytest.raises(EngineDirError, match=message):
        plan_from_json(json.dumps(old).encode(), schedule, "plan")


@given(schedules(max_steps=3))
def test_a_plan_that_says_nothing_of_segments_has_none_and_unknown_ones_are_refused(schedule) -> None:
    found = json.loads(plan_to_json(plan_of(schedule, segments="full")))
    text = json.dumps({**found, "segments": "all"}).encode()
    with pytest.raises(EngineDirError, match="plan does not have the expected form: ValueError unknown segments 'all'"):
        plan_from_json(text, schedule, "plan")
    del found["segments"]
    assert plan_from_json(json.dumps(found).encode(), schedule, "plan") == plan_of(schedule)


def test_engine_directories_of_an_older_version_ask_for_a_new_export() -> None:
    old = json.dumps({"format": "goc_deploy.engine_dir", "version": MANIFEST_VERSION - 1})
    with pytest.raises(EngineDirError, match=f"this goc_deploy reads {MANIFEST_VERSION}; export again"):
        manifest_from_json(old.encode(), "manifest.json")
