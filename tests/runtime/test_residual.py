"""Plans that predict the residual of whole steps, in sessions on the CPU and on stand-ins."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

import goc_deploy
from goc_deploy.api import cpu_backend
from goc_deploy.conditions.captions import conditions_from_labels
from goc_deploy.display.engines import launched_graphs
from goc_deploy.display.heat_map import heat_map
from goc_deploy.display.plans import action_rows
from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.runtime import buffers
from goc_deploy.runtime.calibration.stepper import load_stepper
from goc_deploy.runtime.calibration.trajectory import Trajectory
from goc_deploy.runtime.loading import load_engines
from goc_deploy.runtime.request import Request
from goc_deploy.runtime.session import Session
from goc_deploy.spec import ModelSpec
from goc_deploy.trace import Span
from tests.reference import relative_l2, worst_step
from tests.stand_ins.loading import copy_with_engines, stand_in_pipeline

LABELS, SCALE, STEPS = (1, 7, 4), 2.0, 8
LAGRANGE, GRADIENT = "fora:2+lagrange:2,level=residual", "fora:3+gc:0.5,level=residual"
NOISE = np.random.default_rng(3).standard_normal((3, 4, 8, 8)).astype(np.float32)
REQUEST = {"latents": NOISE, "cfg_scale": SCALE, "trajectory": True}


@pytest.fixture(scope="module")
def engine(golden_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden model with plans that predict the residual."""
    directory = tmp_path_factory.mktemp("residual") / "engine"
    shutil.copytree(golden_engine, directory)
    for spec in (LAGRANGE, GRADIENT):
        for sampler in ("ddim", "dpm++"):
            name = f"{spec.partition(',')[0]}-{sampler}".replace(":", "-")
            goc_deploy.add_plan(directory, spec, name=name, steps=STEPS, sampler=sampler)
    return directory


def request_of(spec: ModelSpec) -> Request:
    conditions = conditions_from_labels(LABELS, spec, None)
    return Request(conditions, NOISE[:, None], np.full(len(LABELS), SCALE), 3)


PLANS = (
    "fora-2+lagrange-2-ddim",
    "fora-3+gc-0.5-ddim",
    "fora-2+lagrange-2-dpm++",
    "fora-3+gc-0.5-dpm++",
)


@pytest.mark.parametrize("plan", PLANS)
def test_a_session_draws_what_a_trajectory_in_numpy_draws(engine: Path, plan: str) -> None:
    with goc_deploy.load(engine, plan=plan) as pipe:
        found = pipe.generate(LABELS, **REQUEST)
        schedule, table = pipe.plan.schedule, pipe.plan.sampler
    stepper = load_stepper(EngineDir.open(engine), cpu_backend(), table, len(LABELS))
    trajectory = Trajectory(stepper, request_of(stepper.spec), schedule.history, 3, "residual")
    expected = []
    for step, rows in enumerate(schedule.coefficients):
        trajectory.advance(step, rows)
        expected.append(trajectory.latents)
    assert found.trajectory is not None
    assert worst_step(found.trajectory, np.stack(expected)) < 1e-5


@pytest.mark.parametrize("weights", ["shared", "embedded"])
@pytest.mark.parametrize("segments", [True, False])
def test_a_device_draws_what_the_host_draws_and_replays_it(
    engine: Path, tmp_path: Path, weights: str, segments: bool
) -> None:
    copy = copy_with_engines(engine, tmp_path / "engine", weights, segments=segments)
    for plan in PLANS[:2]:
        with goc_deploy.load(engine, plan=plan) as pipe:
            expected = pipe.generate(LABELS, **REQUEST).trajectory
        on_device, _ = stand_in_pipeline(copy, plan)
        first = on_device.generate(LABELS, **REQUEST).trajectory
        assert worst_step(first, expected) < 1e-5
        np.testing.assert_array_equal(on_device.generate(LABELS, **REQUEST).trajectory, first)


def test_a_collapsed_step_is_one_launch_and_reads_the_rows_of_the_final_layer_only(
    engine: Path,
) -> None:
    directory, backend = EngineDir.open(engine), cpu_backend()
    plan, spec = directory.plan(PLANS[0]), directory.manifest.model
    session = Session(load_engines(directory, [plan], backend), backend, spec, "fp32", plan, 3)
    for k, step in enumerate(session.prepare(request_of(spec)).steps):
        collapsed = plan.step_kind(k) == "collapsed"
        rows, *_ = step.start[0].outputs["modulation"].shape
        assert rows == (2 if collapsed else spec.modulation.count)
        names = [launch.name for launch in step.updates]
        full = [*spec.unit_names, "residual"]
        assert names == (["predict residual"] if collapsed else full)


def test_a_plan_is_shown_with_its_residuals(engine: Path) -> None:
    directory, spans = EngineDir.open(engine), list[Span]()
    plan = directory.plan(PLANS[0])
    with goc_deploy.load(engine, plan=PLANS[0]) as pipe:
        pipe.generate(LABELS, **REQUEST, spans=spans)
    ran = [span.name for span in spans if span.category == "launch"]
    graphs = [launched_graphs(plan, directory.manifest, k) for k in range(STEPS)]
    said = [Path(path).stem for step in graphs for path in step]
    assert said.count("residual") == ran.count("residual") > 0
    assert "Lagrange of the residual" in action_rows(plan)[1][3]
    assert heat_map(plan.schedule).marks


def test_planned_bytes_are_what_is_allocated(engine: Path) -> None:
    with goc_deploy.load(engine, plan=PLANS[0], batch_size=2) as pipe:
        held = buffers.allocate_buffers(cpu_backend(), pipe.spec, "fp32", pipe.plan, 2)
        planned = buffers.planned_bytes(pipe.spec, "fp32", pipe.plan, 2)
        cache = pipe.plan.cache_bytes(pipe.spec, 4, 4)
    assert held.start is not None
    assert cache == sum(b.nbytes for b in (*held.slots, held.start))
    big = [held.modulation.table, held.modulation.rows, held.prediction, held.noise]
    big += [held.start, held.ones]
    big += [*held.tokens, *held.slots, *held.latents]
    assert sum(b.nbytes for b in big if b is not None) == planned


def test_a_run_of_full_steps_is_not_changed_by_keeping_residuals(engine: Path) -> None:
    """The first step of a plan with residuals is that of a plan without cache."""
    goc_deploy.add_plan(engine, "none", name="uncached", steps=STEPS)
    with goc_deploy.load(engine, plan="uncached") as pipe:
        uncached = pipe.generate(LABELS, **REQUEST).trajectory
    with goc_deploy.load(engine, plan=PLANS[0]) as pipe:
        found = pipe.generate(LABELS, **REQUEST).trajectory
    assert relative_l2(found[0], uncached[0]) < 1e-7
    assert 1e-6 < relative_l2(found[-1], uncached[-1]) < 0.2
