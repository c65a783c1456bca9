"""Plans of a model with a text stream: every form against calibration's own arithmetic."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

import goc_deploy
from goc_deploy.conditions.captions import conditions_from_labels
from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.engines.ort import OrtBackend
from goc_deploy.host_memory import host_array
from goc_deploy.runtime.calibration.stepper import load_stepper
from goc_deploy.runtime.calibration.trajectory import Trajectory
from goc_deploy.runtime.loading import load_engines, load_pipelines
from goc_deploy.runtime.request import Request
from goc_deploy.runtime.session import Session
from goc_deploy.schedule import COMPUTE, REUSE, Schedule, gradient
from tests.conftest import Command
from tests.distances import relative_l2
from tests.qwen_folder import random_qwen, write_captions

pytest.importorskip("diffusers", reason="diffusers comes with the judges extra")
STEPS, SCALE = 6, 4.0
PLANS = ("none", "fora:2+gc:0.5", "file-partly", "fora:2,level=residual")


class MergingOrt(OrtBackend):
    """ONNX Runtime, told to run plans as TensorRT does."""

    stacks = True


def partly_computed(units: int) -> Schedule:
    """A schedule that computes a random part of the units in most steps."""
    chance = random.Random(3)
    rows = [(COMPUTE,) * units] * 2
    for step in range(2, STEPS):
        actions = [COMPUTE, REUSE, gradient(0.5)]
        rows.append(
            tuple(chance.choice(actions if step % 3 else actions[1:]) for _ in range(units))
        )
    branches = ("attn", "mlp")
    return Schedule(units // 2, branches, tuple(rows), history="used")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, command: Command) -> Path:
    folder = tmp_path_factory.mktemp("streams")
    random_qwen().save_pretrained(folder / "transformer")
    partly_computed(6).save(folder / "partly.json")
    captions = write_captions(folder / "captions.npz")
    specs = ("none", "fora:2+gc:0.5", f"file:{folder / 'partly.json'}", "fora:2,level=residual")
    command(
        "goc-export",
        folder / "transformer",
        *("-o", folder / "engine", "--size", "80x48", "--max-size", "160x96"),
        *("--steps", STEPS, "--captions", captions, "--segments", "full"),
        *(text for spec in specs for text in ("--plan", spec)),
    )
    return folder / "engine"


def request_of(opened: EngineDir, latents: np.ndarray, captions: object) -> Request:
    spec = opened.manifest.model
    conditions = conditions_from_labels([0, 1], spec, captions)
    return Request(conditions, latents[:, None], np.full(2, SCALE), spec.channels)


@pytest.fixture(scope="module")
def latents(engine: Path) -> np.ndarray:
    shape = EngineDir.open(engine).manifest.model.latents
    return np.random.default_rng(1).standard_normal((2, *shape), np.float32)


@pytest.mark.parametrize("plan", PLANS)
def test_every_form_computes_what_calibration_computes(
    engine: Path, latents: np.ndarray, plan: str
) -> None:
    opened = EngineDir.open(engine)
    compiled = opened.plan(plan)
    stepper = load_stepper(opened, OrtBackend(), compiled.sampler, 2)
    schedule = compiled.schedule
    trajectory = Trajectory(
        stepper, request_of(opened, latents, stepper.captions), schedule.history, 2, schedule.level
    )
    for step, rows in enumerate(schedule.coefficients):
        trajectory.advance(step, rows)
    given = {"latents": latents, "cfg_scale": SCALE, "decode": False}
    for history in ("features", "sums") if "residual" not in plan else ("features",):
        with goc_deploy.load(engine, plan=plan, history=history) as pipe:
            found = pipe.generate([0, 1], **given).latents
        assert relative_l2(found, trajectory.latents) < 1e-5
    with load_pipelines(opened, MergingOrt(), [plan], None, 2)[0] as pipe:
        found = pipe.generate([0, 1], **given).latents
    assert relative_l2(found, trajectory.latents) < 1e-5


def test_collapsed_steps_touch_no_text(engine: Path, latents: np.ndarray) -> None:
    opened, backend = EngineDir.open(engine), OrtBackend()
    plan, manifest = opened.plan("fora:2+gc:0.5"), opened.manifest
    engines = load_engines(opened, [plan], backend, (plan.sampler.graph,))
    found = []
    for poisoned in (False, True):
        session = Session(engines, backend, manifest.model, manifest.precision, plan, 2)
        bound = session.prepare(request_of(opened, latents, engines.captions))
        text = next(
            launch.outputs["text"] for launch in bound.steps[0].before if launch.name == "captions"
        )
        for step, launches in enumerate(bound.steps):
            for launch in launches.before:
                launch.run()
            kept = host_array(text).copy()
            if poisoned and plan.step_kind(step) == "collapsed":
                host_array(text)[...] = np.nan
            for launch in launches.launches:
                launch.run()
            host_array(text)[...] = kept
        found.append(host_array(bound.latents[-1]).copy())
    assert plan.features_of("text") == 0
    assert np.isfinite(found[0]).all()
    np.testing.assert_array_equal(*found)
