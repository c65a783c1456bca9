"""Plans that keep sums of later steps in place of features, and the choice between both."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import goc_deploy
from goc_deploy.api import cpu_backend
from goc_deploy.compiler import Plan, compile_schedule, in_form
from goc_deploy.compiler.plan import PlanForm
from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.engine_dir.manifest_file import manifest_to_json
from goc_deploy.engine_dir.reading import MANIFEST_NAME
from goc_deploy.engines.host import HostDevice
from goc_deploy.engines.ort import OrtBackend
from goc_deploy.errors import EngineDirError, UsageError
from goc_deploy.options import HISTORIES
from goc_deploy.runtime import buffers, modulation_buffers, row_buffers
from goc_deploy.runtime.history import WORTH_BYTES, plan_to_run
from goc_deploy.runtime.loading import load_pipelines
from goc_deploy.runtime.lookahead import chunk_steps, lookahead_of, table_steps
from goc_deploy.schedule import Schedule
from goc_deploy.spec import ModelSpec
from goc_deploy.trace import Span
from tests.conftest import GOLDEN_PLANS
from tests.goc_deploy.strategies import schedules
from tests.reference import relative_l2, worst_step
from tests.stand_ins.device import StandInDevice
from tests.stand_ins.loading import copy_with_engines, stand_in_backend
from tests.stand_ins.onnxruntime import StandInOrtCudaBackend, StandInRuntime

GRADIENT = "fora:2+gc:1.2"
FORMS = st.sampled_from(["host", "device", "sums"])


@pytest.mark.parametrize("spec", GOLDEN_PLANS)
def test_sums_reproduce_the_golden_trajectories(
    golden_engine: Path, golden: dict[str, np.ndarray], spec: str
) -> None:
    with goc_deploy.load(golden_engine, plan=spec, history="sums") as loaded:
        found = loaded.generate(
            golden["labels"], cfg_scale=2.0, latents=golden["noise"], trajectory=True
        )
    assert found.report["plan_form"] == "sums"
    assert found.trajectory is not None
    assert worst_step(found.trajectory, golden[GOLDEN_PLANS[spec]]) < 1e-5


def test_a_plan_that_is_compiled_on_the_fly_keeps_sums_too(golden_engine: Path) -> None:
    found = []
    for history in ("features", "sums"):
        with goc_deploy.load(golden_engine, plan="fora:3+lagrange:2", history=history) as loaded:
            found.append(loaded.generate([1, 2], seed=1, trajectory=True).trajectory)
    assert worst_step(*found) < 1e-5


@pytest.mark.parametrize("chunk", [1, 6, 7])
def test_gates_of_later_steps_are_there_whatever_the_chunks(
    golden_engine: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    with goc_deploy.load(golden_engine, plan=GRADIENT, history="sums") as whole:
        expected = whole.generate([1, 7], seed=1).latents
        spec, plan = whole.spec, whole.plan
    steps = table_steps(plan, lookahead_of(plan), chunk)
    row_bytes = spec.modulation.count * row_buffers.table_labels(spec, 16) * spec.hidden * 4
    monkeypatch.setattr(modulation_buffers, "TABLE_BUDGET_BYTES", steps * row_bytes)
    with goc_deploy.load(golden_engine, plan=GRADIENT, history="sums") as chunked:
        held = buffers.allocate_buffers(cpu_backend(), spec, "fp32", plan, 16)
        assert held.modulation.chunk >= chunk
        assert (held.modulation.chunk < plan.steps) == (steps < plan.steps)
        assert relative_l2(chunked.generate([1, 7], seed=1).latents, expected) < 1e-5


@given(schedules(), FORMS, st.integers(1, 9))
def test_gates_stay_at_their_place_while_steps_read_them(
    schedule: Schedule, form: PlanForm, chunk: int
) -> None:
    spec = ModelSpec(schedule.depth, 8, 2, 16, 2, 2, 4, 10, False)
    plan = in_form(compile_schedule(schedule, spec), spec, form)
    lookahead = lookahead_of(plan)
    held: dict[int, int] = {}
    for step in range(plan.steps):
        table = chunk_steps(plan, lookahead, step - step % chunk, chunk)
        assert table[step % chunk] == step
        for later in lookahead.fetched[step]:
            assert later in table
            held[lookahead.place[later]] = later
        for later in plan.targets(step):
            assert held[lookahead.place[later]] == later
    assert lookahead.places == len(held)


def test_planned_bytes_are_what_is_allocated(golden_engine: Path) -> None:
    with goc_deploy.load(golden_engine, plan=GRADIENT, history="sums", batch_size=2) as pipe:
        held = buffers.allocate_buffers(cpu_backend(), pipe.spec, "fp32", pipe.plan, 2)
        planned = buffers.planned_bytes(pipe.spec, "fp32", pipe.plan, 2)
        cache = pipe.plan.cache_bytes(pipe.spec, 4, 4)
    assert held.zeros is None
    assert len(held.slots) == 1
    assert cache == sum(b.nbytes for b in (*held.slots, *held.accumulators))
    big = [held.modulation.table, held.modulation.rows, *held.modulation.gates_ahead]
    big += [held.prediction, held.noise]
    big += [*held.tokens, *held.slots, *held.accumulators, *held.latents]
    assert sum(b.nbytes for b in big) == planned


def test_launches_name_the_unit_and_a_collapsed_step_only_adds(golden_engine: Path) -> None:
    spans: list[Span] = []
    with goc_deploy.load(golden_engine, plan="fora:2", history="sums") as pipe:
        pipe.generate([1], spans=spans)
    names = [span.name for span in spans if span.category == "launch"]
    assert names.count("accumulate 0, 1 taps") == 10
    assert names[-5:] == ["modulation", "embed", "collect", "final", "sampler"]


class SmallHost(HostDevice):
    """A host that reports little free memory."""

    def __init__(self, free: int) -> None:
        self._free = free

    def free_bytes(self) -> int:
        return self._free


def chosen(engine: Path, spec: str, history: str, backend: OrtBackend, images: int = 1) -> Plan:
    directory = EngineDir.open(engine)
    return plan_to_run(directory.plan(spec), directory.manifest, backend, images, history)


def test_a_small_plan_keeps_features_and_the_report_says_why(golden_engine: Path) -> None:
    with goc_deploy.load(golden_engine, plan=GRADIENT) as pipe:
        report = pipe.generate([1]).report
    assert report["plan_form"] == "host"
    assert report["plan_form_reason"].startswith("buffers take 4.6 MB with features and 5.0 MB")
    for history, form in (("features", "host"), ("sums", "sums")):
        plan = chosen(golden_engine, GRADIENT, history, OrtBackend())
        assert (plan.form, plan.form_reason) == (form, "asked for")


def test_sums_are_chosen_where_they_save_much_or_features_hardly_fit(golden_engine: Path) -> None:
    directory, name = EngineDir.open(golden_engine), "fora:2"
    plan, manifest, backend = directory.plan(name), directory.manifest, OrtBackend()
    images = 1
    while plan_to_run(plan, manifest, backend, images).form == "host":
        images *= 2
    forms = [in_form(plan, manifest.model, form) for form in ("host", "sums")]
    kept, summed = (buffers.planned_bytes(manifest.model, "fp32", f, images) for f in forms)
    assert kept - summed >= WORTH_BYTES
    reason = plan_to_run(plan, manifest, backend, images).form_reason
    assert f"{kept / 1e6:.1f} MB with features and {summed / 1e6:.1f} MB with sums" in reason

    small = buffers.planned_bytes(manifest.model, "fp32", forms[0], 2)
    for free, form in ((2 * small, "host"), (2 * small - 1, "sums")):
        found = plan_to_run(plan, manifest, OrtBackend(device=SmallHost(free)), 2)
        assert found.form == form
    assert found.form_reason.endswith("of free memory")
    full = chosen(golden_engine, "none", "auto", OrtBackend(device=SmallHost(1000)))
    assert full.form == "host"  # sums would not be smaller


def test_plans_without_sums_keep_features_unless_sums_are_asked_for(
    golden_engine: Path, tmp_path: Path
) -> None:
    engine = tmp_path / "engine"
    shutil.copytree(golden_engine, engine)
    goc_deploy.add_plan(engine, "fora:2,level=residual", name="residual", steps=4)
    with goc_deploy.load(engine, plan="residual") as pipe:
        report = pipe.generate([1]).report
    assert report["plan_form"] == "host"
    assert "predicts the residual of all units" in report["plan_form_reason"]
    with pytest.raises(UsageError, match="its history cannot be kept as sums"):
        goc_deploy.load(engine, plan="residual", history="sums")
    goc_deploy.add_plan(engine, "fora:2+gc:0.5", name="long", steps=200)
    with pytest.raises(UsageError, match="earlier steps, more than 64; use history=computed"):
        goc_deploy.load(engine, plan="long", history="sums")
    with pytest.raises(UsageError, match="history must be auto, features, sums, got 'all'"):
        goc_deploy.load(engine, plan="residual", history="all")


def test_an_engine_directory_without_the_graphs_keeps_features(
    golden_engine: Path, tmp_path: Path
) -> None:
    engine = tmp_path / "engine"
    shutil.copytree(golden_engine, engine)
    manifest = EngineDir.open(engine).manifest
    kept = {s: path for s, path in manifest.predict.items() if s[0] not in "as"}
    assert len(kept) < len(manifest.predict)
    (engine / MANIFEST_NAME).write_text(manifest_to_json(replace(manifest, predict=kept)))
    with pytest.raises(EngineDirError, match=r"lists no graph for 'a\*1', which a plan needs"):
        goc_deploy.load(engine, plan="fora:2", history="sums")
    little = OrtBackend(device=SmallHost(1000))
    plan = chosen(engine, "fora:2", "auto", little)
    assert plan.form == "host"
    assert "lacks the graph 'a*1' of sums; add the plan again" in plan.form_reason


def test_a_command_takes_the_history(golden_engine: Path, tmp_path: Path, command) -> None:
    for history in HISTORIES:
        report = tmp_path / f"{history}.json"
        arguments = ("--labels", 1, "--plan", "fora:2", "--history", history, "--report", report)
        command("goc-run", golden_engine, *arguments, "-o", tmp_path / "x.npz")
        form = json.loads(report.read_text())["plan_form"]
        assert form == ("sums" if history == "sums" else "host")


@pytest.fixture(scope="module")
def device_engines(golden_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden model with TensorRT engines of the stand-in."""
    return copy_with_engines(golden_engine, tmp_path_factory.mktemp("sums") / "engine", "shared")


ROUTER = next(spec for spec in GOLDEN_PLANS if spec.startswith("l2c"))


@pytest.mark.parametrize("spec", [GRADIENT, ROUTER])
@pytest.mark.parametrize("graphs", [True, False])
def test_tensorrt_draws_the_golden_trajectories_with_sums_and_replays_them(
    device_engines: Path, golden: dict[str, np.ndarray], spec: str, graphs: bool
) -> None:
    backend, tensorrt = stand_in_backend(device_engines, graphs=graphs)
    directory = EngineDir.open(device_engines)
    assert not any(e.startswith("accumulate") for e in backend.describe().get("engines", ()))
    (pipe,) = load_pipelines(directory, backend, [spec], None, 1, history="sums")
    for _ in range(3):
        found = pipe.generate(
            golden["labels"], cfg_scale=2.0, latents=golden["noise"], trajectory=True
        )
        assert worst_step(found.trajectory, golden[GOLDEN_PLANS[spec]]) < 1e-5
    assert found.report["plan_form"] == "sums"
    assert ("replay" in {call[0] for call in tensorrt.device.calls}) == graphs


def test_a_gpu_keeps_features_while_they_fit(device_engines: Path) -> None:
    directory = EngineDir.open(device_engines)
    manifest, plan = directory.manifest, directory.plan("fora:2")
    planned = buffers.planned_bytes(
        manifest.model, "fp32", in_form(plan, manifest.model, "device"), 4096
    )
    for capacity, form in ((2**40, "device"), (2 * planned - 1, "sums")):
        backend, _ = stand_in_backend(device_engines, capacity=capacity)
        assert plan_to_run(plan, manifest, backend, 4096).form == form


def test_onnxruntime_on_a_gpu_draws_the_golden_trajectories_with_sums(
    golden_engine: Path, golden: dict[str, np.ndarray]
) -> None:
    directory = EngineDir.open(golden_engine)
    backend = StandInOrtCudaBackend(StandInRuntime(StandInDevice()))
    (pipe,) = load_pipelines(directory, backend, [GRADIENT], None, 1, history="sums")
    for _ in range(2):
        found = pipe.generate(
            golden["labels"], cfg_scale=2.0, latents=golden["noise"], trajectory=True
        )
        assert worst_step(found.trajectory, golden["fora_50_gc"]) < 1e-5
