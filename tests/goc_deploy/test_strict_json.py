"""Plans and manifests on disk."""

from __future__ import annotations

import contextlib
import json
import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from goc_deploy.compiler import Plan, check_plan, compile_schedule
from goc_deploy.compiler.plan import SEGMENTS
from goc_deploy.compiler.plan_file import PLAN_VERSION, plan_from_json, plan_to_json
from goc_deploy.conditions.labels import labels_from_text
from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.engine_dir.manifest_file import (
    MANIFEST_VERSION,
    manifest_from_json,
    manifest_to_json,
)
from goc_deploy.engine_dir.reading import read_manifest
from goc_deploy.errors import EngineDirError, GocError, ScheduleError, UsageError
from goc_deploy.policies.bases import ForaOptions
from goc_deploy.policies.options import filled
from goc_deploy.schedule.schedule import schedule_from_file
from goc_deploy.spec import DIFFUSION_PREDICTIONS, ModelSpec
from tests.goc_deploy.strategies import schedules


def plan_of(
    schedule, sampler: str = "ddim", prediction: str = "eps", segments: str = "none"
) -> Plan:
    spec = ModelSpec(schedule.depth, 8, 2, 16, 2, 2, 4, 10, True, prediction=prediction)
    return compile_schedule(schedule, spec, sampler, segments=segments)


@given(
    schedules(),
    st.sampled_from(["ddim:0.3", "dpm++", "dpm++:3@leading", "ddpm"]),
    st.sampled_from(DIFFUSION_PREDICTIONS),
    st.sampled_from(SEGMENTS),
)
def test_plans_survive_their_json_form(
    schedule, sampler: str, prediction: str, segments: str
) -> None:
    plan = plan_of(schedule, sampler, prediction, segments)
    assert plan_from_json(plan_to_json(plan).encode(), schedule, "plan") == plan


@given(schedules(max_steps=3), st.integers(0, PLAN_VERSION - 1))
def test_plans_of_an_older_version_ask_for_a_new_export(schedule, version: int) -> None:
    old = json.loads(plan_to_json(plan_of(schedule))) | {"version": version}
    message = (
        f"plan has format version {version}, this goc_deploy reads {PLAN_VERSION}; export again"
    )
    with pytest.raises(EngineDirError, match=message):
        plan_from_json(json.dumps(old).encode(), schedule, "plan")


@given(schedules(max_steps=3))
def test_a_plan_that_says_nothing_of_segments_has_none_and_unknown_ones_are_refused(
    schedule,
) -> None:
    found = json.loads(plan_to_json(plan_of(schedule, segments="full")))
    text = json.dumps({**found, "segments": "all"}).encode()
    with pytest.raises(
        EngineDirError,
        match="plan does not have the expected form: ValueError unknown segments 'all'",
    ):
        plan_from_json(text, schedule, "plan")
    del found["segments"]
    assert plan_from_json(json.dumps(found).encode(), schedule, "plan") == plan_of(schedule)


def test_engine_directories_of_an_older_version_ask_for_a_new_export() -> None:
    old = json.dumps({"format": "goc_deploy.engine_dir", "version": MANIFEST_VERSION - 1})
    with pytest.raises(
        EngineDirError, match=f"this goc_deploy reads {MANIFEST_VERSION}; export again"
    ):
        manifest_from_json(old.encode(), "manifest.json")


@pytest.mark.parametrize("number", ["1e999", "-1e999", "1" * 400, "1" * 5000])
def test_numbers_that_no_float_holds_are_refused(number: str) -> None:
    with pytest.raises(EngineDirError, match="is out of range"):
        manifest_from_json(f'{{"a": {number}}}'.encode(), "manifest.json")


@given(schedules(max_steps=3))
def test_a_count_with_a_fraction_is_refused(schedule) -> None:
    found = json.loads(plan_to_json(plan_of(schedule)))
    with pytest.raises(EngineDirError, match="does not have the expected form"):
        plan_from_json(
            json.dumps({**found, "slots": found["slots"] + 0.9}).encode(), schedule, "plan"
        )


def test_a_plan_that_computes_what_its_schedule_does_not_is_refused(golden_engine: Path) -> None:
    manifest = read_manifest(golden_engine)
    none, fora = manifest.plans[0], manifest.plans[1]
    mixed = replace(none, schedule=fora.schedule)
    with pytest.raises(EngineDirError, match="does not do what its schedule asks for at step 1"):
        EngineDir(golden_engine, replace(manifest, plans=(mixed,))).plan(none.name)


def test_a_plan_with_other_coefficients_than_its_schedule_is_refused(golden_engine: Path) -> None:
    manifest = read_manifest(golden_engine)
    gradients = [entry for entry in manifest.plans if "+gc" in entry.spec]
    assert len(gradients) == 2
    mixed = replace(gradients[0], schedule=gradients[1].schedule)
    with pytest.raises(EngineDirError, match="does not do what its schedule asks for"):
        EngineDir(golden_engine, replace(manifest, plans=(mixed,))).plan(mixed.name)


def read_changed(engine: Path, **changes: Any) -> None:
    manifest_from_json(manifest_to_json(replace(read_manifest(engine), **changes)).encode(), "m")


@pytest.mark.parametrize("classes", [9, 11, 10**6])
def test_more_or_fewer_classes_than_the_label_table_has_rows_are_refused(
    golden_engine: Path, classes: int
) -> None:
    manifest = read_manifest(golden_engine)
    rows = manifest.model.classes + 1
    with pytest.raises(
        EngineDirError, match=f"{classes} classes, but its label table .* has {rows}"
    ):
        read_changed(golden_engine, model=replace(manifest.model, classes=classes))


@pytest.mark.parametrize("size", [2**40, 2**62])
def test_a_weights_file_that_is_larger_than_its_parameters_is_refused_before_it_is_read(
    golden_engine: Path, size: int
) -> None:
    manifest = read_manifest(golden_engine)
    weights = next(unit.weights for unit in manifest.units if unit.weights)
    files = [replace(f, size=size) if f.path == weights else f for f in manifest.files]
    with pytest.raises(EngineDirError, match=f"with {size} bytes, but its parameters take"):
        read_changed(golden_engine, files=tuple(files))


def test_devices_pipes_and_odd_names_are_no_schedules(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (Path("/dev/zero"), tmp_path / "pipe", tmp_path, Path("a\0b"), Path("x" * 5000)):
        with pytest.raises(ScheduleError, match="cannot be read"):
            schedule_from_file(path)


@pytest.mark.parametrize("text", ["\uff11", "\u0663", "2" * 5000, "2.0", ""])
def test_numbers_are_digits_of_ascii_and_few(text: str) -> None:
    with pytest.raises(UsageError, match="must be a whole number"):
        labels_from_text(text, ())
    with pytest.raises(UsageError, match="must be a whole number"):
        filled(ForaOptions, "fora", text, {})


ODD: tuple[Any, ...] = (None, True, -1, 2**70, 1.5, "", "x", [], {}, [[]], "../x", "\ud800")


def mutated(value: Any, generator: random.Random) -> Any:
    """JSON with one value or key, at any depth, changed."""
    if not isinstance(value, dict | list) or not value or generator.random() < 0.15:
        return generator.choice(ODD)
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key, changed = generator.choice(keys), value.copy()
    if generator.random() < 0.1:
        del changed[key]
    else:
        changed[key] = mutated(value[key], generator)
    return changed


def test_mutated_manifests_and_plans_are_read_or_refused(golden_engine: Path) -> None:
    manifest, generator = read_manifest(golden_engine), random.Random(0)
    sound = json.loads((golden_engine / "manifest.json").read_bytes())
    plan = json.loads((golden_engine / manifest.plans[1].plan).read_bytes())
    schedule = EngineDir(golden_engine, manifest).plan(manifest.plans[1].name).schedule
    for _ in range(1500):
        for read in (
            lambda: manifest_from_json(
                json.dumps(mutated(sound, generator)).encode(), "manifest.json"
            ),
            lambda: check_plan(
                plan_from_json(json.dumps(mutated(plan, generator)).encode(), schedule, "plan"),
                manifest.model,
            ),
        ):
            with contextlib.suppress(GocError):
                read()
