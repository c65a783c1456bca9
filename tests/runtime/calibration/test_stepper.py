"""Launches run one at a time, with predictions by NumPy, mean what the compiled pipeline means."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from goc_deploy.api import cpu_backend, load
from goc_deploy.conditions.captions import conditions_from_labels
from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.exporters.router import router_probabilities
from goc_deploy.policies.grammar import parse_policy
from goc_deploy.policies.resolve import schedule_from_policy
from goc_deploy.runtime.calibration.stepper import Stepper, load_stepper
from goc_deploy.runtime.calibration.trajectory import Trajectory
from goc_deploy.runtime.request import Request
from goc_deploy.samplers import sampler_table
from goc_deploy.samplers.process import Process
from goc_deploy.schedule import Schedule
from tests.conftest import GOLDEN_PLANS
from tests.reference import worst_step

LABELS, SCALE, STEPS = (1, 7, 4), 2.0, 20


@pytest.fixture(scope="module")
def stepper(golden_engine: Path) -> Stepper:
    directory, table = EngineDir.open(golden_engine), sampler_table("ddim", STEPS, Process("eps"))
    return load_stepper(directory, cpu_backend(), table, 3)


def request(stepper: Stepper, noise: np.ndarray, scale: float = SCALE) -> Request:
    conditions = conditions_from_labels(LABELS, stepper.spec, stepper.captions)
    return Request(conditions, noise, np.full(len(LABELS), scale), 3)


def stepped(
    stepper: Stepper, schedule: Schedule, noise: np.ndarray, scale: float = SCALE
) -> np.ndarray:
    trajectory = Trajectory(stepper, request(stepper, noise, scale), schedule.history, 4)
    latents = []
    for step, rows in enumerate(schedule.coefficients):
        trajectory.advance(step, rows)
        latents.append(trajectory.latents)
    return np.stack(latents)


@pytest.mark.parametrize("spec", GOLDEN_PLANS)
def test_every_step_of_every_golden_trajectory(
    stepper: Stepper, golden: dict[str, np.ndarray], spec: str
) -> None:
    schedule = schedule_from_policy(
        parse_policy(spec), stepper.spec, STEPS, read_router=router_probabilities
    )
    found = stepped(stepper, schedule, golden["noise"][:, None])
    assert worst_step(found, golden[GOLDEN_PLANS[spec]]) < 1e-4


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_it_agrees_with_the_compiled_pipeline(
    stepper: Stepper, golden_engine: Path, golden: dict[str, np.ndarray], scale: float
) -> None:
    with load(golden_engine, plan="fora:2+gc:1.2") as pipeline:
        expected = pipeline.generate(
            LABELS, latents=golden["noise"], cfg_scale=scale, trajectory=True
        ).trajectory
        found = stepped(stepper, pipeline.plan.schedule, golden["noise"][:, None], scale)
    assert expected is not None
    assert worst_step(found, expected) < 1e-5


@pytest.mark.parametrize("sampler", ["dpm++", "ddim:0.5"])
def test_trajectories_that_advance_in_turn_do_not_meet(golden_engine: Path, sampler: str) -> None:
    steps = 6
    table = sampler_table(sampler, steps, Process("eps"))
    stepper = load_stepper(EngineDir.open(golden_engine), cpu_backend(), table, 3)
    schedule = schedule_from_policy(parse_policy("fora:2+gc:1.0"), stepper.spec, steps)
    draws = 1 + (steps if table.stochastic else 0)
    generator = np.random.default_rng(1)
    noise = generator.standard_normal((2, len(LABELS), draws, 4, 8, 8)).astype(np.float32)
    alone = [stepped(stepper, schedule, one)[-1] for one in noise]
    both = [Trajectory(stepper, request(stepper, one), "used", 2) for one in noise]
    fork = both[0]
    for step, rows in enumerate(schedule.coefficients):
        fork = both[0].fork() if step == 3 else fork
        for trajectory in both:
            trajectory.advance(step, rows)
    for trajectory, expected in zip(both, alone, strict=True):
        np.testing.assert_array_equal(trajectory.latents, expected)
    for step in range(3, steps):
        fork.advance(step, schedule.coefficients[step])
    np.testing.assert_array_equal(fork.latents, alone[0])
