"""The stepper and the compiled pipeline are two implementations of one meaning."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from goc_deploy.api import cpu_backend, load
from goc_deploy.errors import EngineDirError
from goc_deploy.policies.grammar import parse_policy
from goc_deploy.policies.resolve import schedule_from_policy
from goc_deploy.runtime.loading import load_stepper
from goc_deploy.runtime.stepper import Stepper
from goc_deploy.runtime.trajectory import ImageBatch, Trajectory
from goc_deploy.samplers import sampler_table
from goc_deploy.samplers.process import Process
from goc_deploy.schedule import Schedule
from tests.conftest import GOLDEN_PLANS
from tests.reference import relative_l2, worst_step

LABELS, SCALE, STEPS = (1, 7, 4), 2.0, 20


@pytest.fixture(scope="module")
def stepper(golden_engine: Path) -> Stepper:
    return load_stepper(
        golden_engine, cpu_backend(), sampler_table("ddim", STEPS, Process("eps")), 3
    )


def stepped(
    stepper: Stepper, schedule: Schedule, noise: np.ndarray, scale: float = SCALE
) -> np.ndarray:
    batch = ImageBatch(LABELS, noise, scale, 3)
    trajectory = Trajectory(stepper, batch, schedule.history, 4)
    latents = []
    for step, rows in enumerate(schedule.coefficients):
        trajectory.advance(step, rows)
        latents.append(trajectory.latents)
    return np.stack(latents)


@pytest.mark.parametrize("spec", GOLDEN_PLANS)
def test_every_step_of_every_golden_trajectory(
    stepper: Stepper, golden: dict[str, np.ndarray], spec: str
) -> None:
    schedule = schedule_from_policy(parse_policy(spec), stepper.spec, STEPS)
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


def test_looking_at_a_full_step_changes_nothing(
    stepper: Stepper, golden: dict[str, np.ndarray]
) -> None:
    schedule = schedule_from_policy(parse_policy("fora:2+gc:1.0"), stepper.spec, STEPS)
    trajectory = Trajectory(
        stepper, ImageBatch(LABELS, golden["noise"][:, None], SCALE, 3), "used", 2
    )
    seen: list[int] = []
    for step, rows in enumerate(schedule.coefficients[:4]):
        trajectory.look(step, lambda unit, _: seen.append(unit))
        trajectory.advance(step, rows)
    assert seen == 4 * list(range(stepper.spec.units))
    assert (
        relative_l2(trajectory.latents, stepped(stepper, schedule, golden["noise"][:, None])[3])
        < 1e-6
    )


def test_a_directory_without_a_unit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineDirError, match="not a directory"):
        load_stepper(
            tmp_path / "nothing", cpu_backend(), sampler_table("ddim", STEPS, Process("eps")), 1
        )
