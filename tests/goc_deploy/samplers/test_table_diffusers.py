"""Sampler tables against the schedulers of diffusers, step by step.

The models predict arbitrary numbers.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from goc_deploy.samplers import sampler_table
from goc_deploy.samplers.process import Process
from tests.reference import SIGNAL, relative_l2, table_step

diffusers = pytest.importorskip("diffusers", reason="diffusers comes with the judges extra")

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning"
)  # diffusers with NumPy 2

PREDICTION_TYPES = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
# What PixArt-alpha ships in scheduler/scheduler_config.json; DiT-XL/2 ships the same betas with
# DDIM.
PIXART = {
    "algorithm_type": "dpmsolver++",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "euler_at_final": False,
    "lower_order_final": True,
    "num_train_timesteps": 1000,
    "solver_order": 2,
    "solver_type": "midpoint",
    "steps_offset": 0,
    "thresholding": False,
    "timestep_spacing": "linspace",
    "use_karras_sigmas": False,
}


def follow(
    scheduler: Any,
    sampler: str,
    steps: int,
    prediction: str = "eps",
    channels: int = 1,
    skip: int = 0,
    **more: Any,
) -> float:
    """The largest difference of a step.

    Both sides start from diffusers' latents, so errors do not add up.

    The scheduler gets its process in float64: at 250 steps its float32 betas are off by 3e-5.
    """
    scheduler.alphas_cumprod = torch.from_numpy(SIGNAL)
    scheduler.set_timesteps(steps)
    table = sampler_table(sampler, steps, Process(prediction))
    assert scheduler.timesteps.tolist() == list(table.timesteps)
    step_of, generator, noises = (
        table_step(table),
        torch.Generator().manual_seed(1),
        torch.Generator().manual_seed(2),
    )
    x, worst = torch.randn(1, 1, 4, 4, generator=generator, dtype=torch.float64), 0.0
    for k, t in enumerate(scheduler.timesteps[: steps - skip]):
        m = torch.randn(1, channels, 4, 4, generator=generator, dtype=torch.float64).clamp(-1, 1)
        drawn = torch.Generator()
        drawn.set_state(noises.get_state())
        after = scheduler.step(m, t, x, generator=noises, **more).prev_sample
        z = torch.randn(1, channels, 4, 4, generator=drawn, dtype=torch.float64)[:, :1]
        found = step_of(k, x, m[:, :1], m[:, 1:], z)
        worst, x = max(worst, relative_l2(found.numpy(), after.numpy())), after
    return worst


@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("steps", [1, 2, 5, 14, 15, 20, 50])
def test_dpm_solver_tables_are_those_of_diffusers(order: int, steps: int, prediction: str) -> None:
    settings = {**PIXART, "solver_order": order, "prediction_type": PREDICTION_TYPES[prediction]}
    sampler = "dpm++" if order == 2 else f"dpm++:{order}"
    assert (
        follow(diffusers.DPMSolverMultistepScheduler(**settings), sampler, steps, prediction) < 1e-5
    )


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("steps", [7, 20])
def test_dpm_solver_steps_are_spaced_as_by_diffusers(steps: int, spacing: str) -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(**{**PIXART, "timestep_spacing": spacing})
    assert follow(scheduler, f"dpm++@{spacing}", steps) < 1e-5


@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_ddim_tables_are_those_of_diffusers(eta: float, spacing: str, prediction: str) -> None:
    """If the stride is whole, diffusers steps to ``t - stride``.

    That is no timestep of a ``linspace``.
    """
    scheduler = diffusers.DDIMScheduler(
        clip_sample=False,
        timestep_spacing=spacing,
        prediction_type=PREDICTION_TYPES[prediction],
        beta_start=1e-4,
        beta_end=0.02,
    )
    assert follow(scheduler, f"ddim:{eta}@{spacing}", 20, prediction, eta=eta) < 1e-5


@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("steps", [2, 20, 250])
def test_ddpm_tables_with_learned_sigma_are_those_of_diffusers(
    steps: int, spacing: str, prediction: str
) -> None:
    scheduler = diffusers.DDPMScheduler(
        variance_type="learned_range",
        clip_sample=False,
        timestep_spacing=spacing,
        prediction_type=PREDICTION_TYPES[prediction],
    )
    skip = 1 if spacing == "trailing" else 0  # there diffusers adds noise to the finished sample
    assert follow(scheduler, f"ddpm@{spacing}", steps, prediction, channels=2, skip=skip) < 1e-5


def test_ancestral_ddim_is_ddpm_with_the_least_variance() -> None:
    scheduler = diffusers.DDPMScheduler(
        variance_type="fixed_small", clip_sample=False, timestep_spacing="linspace"
    )
    assert follow(scheduler, "ddim:1", 20) < 1e-5
