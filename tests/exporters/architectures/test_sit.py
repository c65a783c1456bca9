"""SiT, the smallest architecture: the DiT's units, a flow's sampler."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import goc_deploy
from benchmarks.make_checkpoint import random_state
from goc_deploy.compiler import compile_schedule
from goc_deploy.errors import ModelError, UsageError
from goc_deploy.exporters.architectures.dit_model import DiT
from goc_deploy.policies.grammar import parse_policy
from goc_deploy.policies.resolve import schedule_from_policy
from goc_deploy.samplers import sampler_table
from goc_deploy.samplers.process import Process
from goc_deploy.spec import ModelSpec
from tests.conftest import Command
from tests.reference import eager_trajectory, relative_l2, worst_step

SPEC = ModelSpec(2, 48, 3, 192, 2, 4, 4, 10, True)
STEPS, LABELS = 6, [1, 7]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sit")
    torch.save(random_state(SPEC, 3), folder / "sit.pt")
    plans = ["none", "fora:2", "fora:2+gc:1.0", "fora:2+goc"]
    goc_deploy.export(
        folder / "sit.pt",
        folder / "engine",
        model="sit",
        num_heads=3,
        plans=plans,
        steps=STEPS,
        max_batch=2,
        calibrate=2,
    )
    return folder / "engine"


@pytest.mark.parametrize("plan", ["none", "fora:2", "fora:2+gc:1.0"])
def test_a_flow_is_followed_as_pytorch_follows_it(engine: Path, plan: str) -> None:
    model = DiT(SPEC).eval()
    model.load_state_dict(random_state(SPEC, 3))
    noise = np.random.default_rng(0).standard_normal((2, 1, 4, 8, 8)).astype(np.float32)

    def euler(
        _step: int, x: torch.Tensor, m: torch.Tensor, _v: torch.Tensor, _z: torch.Tensor
    ) -> torch.Tensor:
        return x + m / STEPS

    with goc_deploy.load(engine, plan=plan) as pipe:
        assert (pipe.spec.architecture, pipe.spec.prediction_type, pipe.plan.sampler.sampler) == (
            "sit",
            "flow",
            "euler",
        )
        assert pipe.plan.sampler.timesteps == tuple(k / STEPS for k in range(STEPS))
        found = pipe.generate(LABELS, latents=noise[:, 0], trajectory=True)
        expected = eager_trajectory(
            model, pipe.plan.schedule, pipe.plan.sampler, noise, LABELS, 4.0, 3, euler
        )
    assert found.trajectory is not None
    assert worst_step(found.trajectory, expected) < 1e-4


def test_a_straight_line_is_followed_exactly() -> None:
    table, rng = sampler_table("euler", 7, Process("flow")), np.random.default_rng(0)
    noise, clean = rng.standard_normal((2, 5))
    x = noise
    for k, t in enumerate(table.timesteps):
        np.testing.assert_allclose(x, (1 - t) * noise + t * clean)
        of_x, of_m = table.estimate[k]
        np.testing.assert_allclose(of_x * x + of_m * (clean - noise), clean)
        x = table.latent[k] * x + table.model[k] * (clean - noise)
    np.testing.assert_allclose(x, clean)


def test_samplers_of_diffusions_and_of_flows_are_not_mixed_up(engine: Path) -> None:
    with pytest.raises(
        UsageError,
        match=r"sampler 'ddim' needs .*, but this one predicts 'flow'; use euler or unipc",
    ):
        goc_deploy.add_plan(engine, "fora:3", sampler="ddim")
    with pytest.raises(UsageError, match="sampler 'euler' needs a model that predicts a flow"):
        sampler_table("euler", 5, Process("eps"))
    with pytest.raises(UsageError, match=r"steps must be within 1..1000, got 0"):
        sampler_table("euler", 0, Process("flow"))
    assert goc_deploy.add_plan(engine, "fora:3", steps=9).name == "fora-3"


def test_plans_survive_their_files(engine: Path) -> None:
    with goc_deploy.load(engine, plan="fora:2") as pipe:
        schedule = schedule_from_policy(parse_policy("fora:2"), pipe.spec, STEPS)
        assert (
            compile_schedule(schedule, pipe.spec, "euler", name="fora-2", segments="full")
            == pipe.plan
        )


def test_folders_of_diffusers_hold_no_sit(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "DiTTransformer2DModel"}')
    with pytest.raises(ModelError, match="diffusers has no sit; give a checkpoint"):
        goc_deploy.export(tmp_path, tmp_path / "e", model="sit")


def test_the_command_line_shows_a_flow(engine: Path, command: Command, tmp_path: Path) -> None:
    shown = command("goc-plan", engine, "--show", "fora-2").stdout
    assert "0.166667" in shown
    command("goc-run", engine, "--labels", "1", "--latents-output", tmp_path / "x.npy")
    with goc_deploy.load(engine) as pipe:
        assert relative_l2(np.load(tmp_path / "x.npy"), pipe.generate([1]).latents) < 1e-5
