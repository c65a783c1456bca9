"""Whole runs with every kind of sampler against loops written from the papers."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import goc_deploy
from goc_deploy.api import add_plan, cpu_backend
from goc_deploy.compiler import compile_schedule
from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.errors import VerificationError
from goc_deploy.exporters.architectures.dit_model import DiT
from goc_deploy.runtime import buffers
from goc_deploy.runtime.loading import load_engines
from goc_deploy.runtime.needed_graphs import needed_graphs
from goc_deploy.runtime.noise import image_noise
from goc_deploy.runtime.pipeline import Pipeline
from goc_deploy.schedule import COMPUTE, Schedule
from tests.conftest import GOLDEN
from tests.reference import (
    SamplerStep,
    ancestral_step,
    dpm_solver_step,
    eager_trajectory,
    relative_l2,
    worst_step,
)

LABELS = [1, 7, 4]
SPEC = "fora:2+gc:1.2"
STEPS = {"dpm++": dpm_solver_step, "ddpm": ancestral_step}


@pytest.fixture(scope="module")
def engine(golden_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden engine with a caching plan for every sampler of ``STEPS``."""
    directory = Path(shutil.copytree(golden_engine, tmp_path_factory.mktemp("samplers") / "engine"))
    for sampler in STEPS:
        add_plan(directory, SPEC, name=sampler.replace("+", "p"), steps=12, sampler=sampler)
    return directory


@pytest.fixture(scope="module")
def model(golden_engine: Path) -> DiT:
    with goc_deploy.load(golden_engine) as pipe:
        model = DiT(pipe.spec).eval()
    model.load_state_dict(torch.load(GOLDEN / "model.pt", weights_only=True))
    return model


def eager(
    pipe: Pipeline,
    model: DiT,
    step: Callable[[Sequence[int], str], SamplerStep],
    prediction: str = "eps",
) -> np.ndarray:
    table = pipe.plan.sampler
    draws = 1 + (table.steps if table.stochastic else 0)
    noise = np.stack([image_noise(5, i, draws, (4, 8, 8)) for i in range(len(LABELS))])
    step_of = step(table.timesteps, prediction)
    return eager_trajectory(model, pipe.plan.schedule, table, noise, LABELS, 4.0, step_of=step_of)


@pytest.mark.parametrize("sampler", STEPS)
def test_a_cached_run_is_what_the_papers_formulas_give(
    engine: Path, model: DiT, sampler: str
) -> None:
    with goc_deploy.load(engine, plan=sampler.replace("+", "p")) as pipe:
        found = pipe.generate(LABELS, seed=5, trajectory=True)
        assert (found.report["sampler"], found.report["prediction_type"]) == (sampler, "eps")
        assert worst_step(found.trajectory, eager(pipe, model, STEPS[sampler])) < 1e-4


@pytest.mark.parametrize("sampler", STEPS)
@pytest.mark.parametrize("prediction", ["v", "x0"])
def test_models_that_predict_something_else_run_too(
    engine: Path, model: DiT, sampler: str, prediction: str
) -> None:
    with goc_deploy.load(engine, plan=sampler.replace("+", "p")) as loaded:
        manifest = replace(loaded.manifest, model=replace(loaded.spec, prediction_type=prediction))
        schedule = Schedule(4, ("attn", "mlp"), ((COMPUTE,) * 8,) * 6)
        plan = compile_schedule(schedule, manifest.model, sampler)
        backend = cpu_backend()
        engines = load_engines(EngineDir.open(engine), [plan], backend)
        pipe = Pipeline(manifest, plan, engines, backend, 2, 1)
        found = pipe.generate(LABELS, seed=5, trajectory=True).trajectory
        assert worst_step(found, eager(pipe, model, STEPS[sampler], prediction)) < 1e-4


@pytest.mark.parametrize("batch_size", [3, 2])
def test_each_image_has_the_step_noise_of_its_own_seed(engine: Path, batch_size: int) -> None:
    seeds = [9, 0, 9]
    with goc_deploy.load(engine, plan="ddpm", batch_size=batch_size) as pipe:
        together = pipe.generate(LABELS, seed=seeds, cfg_scale=[2.0, 1.0, 4.0]).latents
        for image, (label, seed, scale) in enumerate(
            zip(LABELS, seeds, (2.0, 1.0, 4.0), strict=True)
        ):
            alone = pipe.generate([label], seed=seed, cfg_scale=scale).latents
            np.testing.assert_array_equal(together[image : image + 1], alone)
        x_t = np.stack([image_noise(seed, 0, 1, (4, 8, 8))[0] for seed in seeds])
        np.testing.assert_array_equal(
            pipe.generate(LABELS, seed=seeds, cfg_scale=4.0, latents=x_t).latents[2], together[2]
        )


def test_a_run_does_not_see_the_estimates_of_the_one_before(engine: Path) -> None:
    with goc_deploy.load(engine, plan="dpmpp") as pipe:
        alone = pipe.generate(LABELS, seed=5).latents
        with np.errstate(all="ignore"), pytest.raises(VerificationError, match="not finite"):
            pipe.generate(LABELS, latents=np.full(alone.shape, 3e38))
        np.testing.assert_array_equal(pipe.generate(LABELS, seed=5).latents, alone)


def test_second_order_is_nearer_to_the_converged_solution_than_first(engine: Path) -> None:
    """Against 200 DDIM steps; at 12 steps the error of DPM-Solver++ is a fraction of DDIM's."""
    for name, sampler, steps in (
        ("exact", "ddim", 200),
        ("first", "dpm++:1", 12),
        ("second", "dpm++", 12),
    ):
        add_plan(engine, "none", name=name, steps=steps, sampler=sampler)
    latents = {}
    for name in ("exact", "first", "second"):
        with goc_deploy.load(engine, plan=name) as pipe:
            latents[name] = pipe.generate(LABELS, seed=5, cfg_scale=1.5).latents
    first, second = (relative_l2(latents[name], latents["exact"]) for name in ("first", "second"))
    assert second < 0.7 * first


def allocated(pipe: Pipeline) -> buffers.Buffers:
    return buffers.allocate_buffers(cpu_backend(), pipe.spec, "fp32", pipe.plan, pipe.batch_size)


def test_one_step_samplers_pay_nothing_for_the_others(engine: Path, golden_engine: Path) -> None:
    with (
        goc_deploy.load(engine, plan="dpmpp") as several,
        goc_deploy.load(golden_engine, plan=SPEC) as one,
    ):
        needed = needed_graphs(EngineDir.open(golden_engine), [one.plan], cpu_backend())
        assert [name for name in needed.units if name.startswith("sampler")] == ["sampler"]
        assert allocated(one).estimates == ()
        held = allocated(several)
        extra = [*held.estimates, held.no_estimate]
        assert [b.nbytes for b in extra] == 3 * [several.batch_size * 4 * 8 * 8 * 4]
        planned = buffers.planned_bytes(several.spec, "fp32", several.plan, several.batch_size)
        without = replace(
            several.plan, sampler=replace(several.plan.sampler, lag_coefficients=((),) * 12)
        )
        assert planned - buffers.planned_bytes(
            several.spec, "fp32", without, several.batch_size
        ) == sum(b.nbytes for b in extra)
