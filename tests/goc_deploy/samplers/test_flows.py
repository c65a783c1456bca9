"""Samplers of flows: UniPC and Euler with a shift, compared with the schedulers of diffusers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from goc_deploy.errors import UsageError
from goc_deploy.exporters.scheduler_probe import probed_table
from goc_deploy.samplers import MAX_LAGS, sampler_table, table_at
from goc_deploy.samplers.process import Process
from tests.reference import relative_l2, table_step

TO_NOISE = Process("flow_to_noise")
SHIFTS, STEPS = (3.0, 5.0), (4, 10, 20, 50)


def toy_velocity(x: torch.Tensor, t: float) -> torch.Tensor:
    return torch.tanh(0.7 * x) + 0.3 * torch.cos(2 * x + t / 300)


def wan_scheduler(shift: float) -> Any:
    diffusers = pytest.importorskip("diffusers", reason="diffusers comes with the judges extra")
    return diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )


@pytest.mark.filterwarnings("ignore")  # of diffusers about itself
@pytest.mark.parametrize("own", [True, False], ids=["own", "probed"])
@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("steps", STEPS)
def test_unipc_takes_the_steps_of_wans_scheduler(own: bool, shift: float, steps: int) -> None:
    scheduler = wan_scheduler(shift)
    scheduler.set_timesteps(steps)
    settings = {"_class_name": "UniPCMultistepScheduler", **scheduler.config}
    table = (
        sampler_table(f"unipc@shift={shift:g}", steps, TO_NOISE)
        if own
        else probed_table(settings, steps, "flow_to_noise")
    )
    assert table.timesteps == tuple(scheduler.timesteps.tolist())
    assert table.timesteps[0] == 999
    assert all(isinstance(t, int) for t in table.timesteps)
    assert table.lags == 2 < MAX_LAGS
    theirs = torch.randn(
        1, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    ours, step = theirs.clone(), table_step(table)
    for k, t in enumerate(scheduler.timesteps):
        theirs = scheduler.step(toy_velocity(theirs, t.item()), t, theirs).prev_sample
        ours = step(k, ours, toy_velocity(ours, t.item()), ours, ours)
        assert relative_l2(ours.numpy(), theirs.numpy()) < 1e-6


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("steps", [1, 2, 3, *STEPS])
def test_unipc_is_the_table_that_is_probed(shift: float, steps: int) -> None:
    settings = {"_class_name": "UniPCMultistepScheduler", **wan_scheduler(shift).config}
    probed = probed_table(settings, steps, "flow_to_noise")
    own = sampler_table(f"unipc@shift={shift}", steps, TO_NOISE)
    assert own.timesteps == probed.timesteps
    # diffusers rounds its noise levels to float32. The signal of the first one is then 1.3 % off,
    # and with it the first log-SNR.
    for column in ("latent", "model", "estimate"):
        np.testing.assert_allclose(getattr(own, column), getattr(probed, column), 1e-4, 1e-6)
    lags = [row[: probed.reach] for row in own.lag_coefficients]
    np.testing.assert_allclose(lags, probed.lag_coefficients, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("steps", STEPS)
def test_euler_with_a_shift_is_diffusers_on_even_noise_levels(shift: float, steps: int) -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers comes with the judges extra")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps).tolist())
    table = sampler_table(f"euler@shift={shift:g}", steps, TO_NOISE)
    np.testing.assert_allclose(table.timesteps, scheduler.timesteps.numpy(), rtol=1e-6)
    np.testing.assert_allclose(table.model, np.diff(scheduler.sigmas.numpy()), atol=1e-6)


@pytest.mark.parametrize("sampler", ["euler", "unipc", "euler@shift=3", "unipc@shift=0.5"])
@given(steps=st.integers(1, 60))
def test_both_directions_of_a_flow_end_at_the_clean_sample(sampler: str, steps: int) -> None:
    """A straight path has the same velocity everywhere, which every solver follows exactly."""
    noise, clean = np.random.default_rng(0).standard_normal((2, 5))
    for prediction, velocity in (("flow", clean - noise), ("flow_to_noise", noise - clean)):
        table, x, kept = sampler_table(sampler, steps, Process(prediction)), noise, []
        for k in range(steps):
            of_x, of_m = table.estimate[k]
            earlier = zip(table.lag_coefficients[k], kept, strict=False)
            after = table.latent[k] * x + table.model[k] * velocity
            after = after + sum(weight * estimate for weight, estimate in earlier)
            kept = [of_x * x + of_m * velocity, *kept]
            x = after
        np.testing.assert_allclose(x, clean, atol=1e-4)  # UniPC begins at 1 - 1e-6


def test_both_directions_of_a_flow_have_the_same_steps() -> None:
    for sampler in ("euler@shift=3", "unipc@shift=3"):
        up = sampler_table(sampler, 7, Process("flow"))
        down = sampler_table(sampler, 7, TO_NOISE)
        np.testing.assert_allclose(up.model, np.negative(down.model), atol=1e-12)
        np.testing.assert_allclose(up.latent, down.latent, atol=1e-12)


def test_a_shift_of_one_changes_nothing() -> None:
    for sampler in ("euler", "unipc"):
        one, plain = (sampler_table(s, 9, TO_NOISE) for s in (f"{sampler}@shift=1", sampler))
        assert one.rows == plain.rows


def test_unipc_follows_chosen_timesteps() -> None:
    timesteps = (999.9, 700.0, 350.0, 20.5)
    table = table_at("unipc", timesteps, TO_NOISE)
    assert table.timesteps == (999, 700, 350, 20)
    np.testing.assert_allclose([-of_m for _, of_m in table.estimate], np.divide(timesteps, 1000))
    with pytest.raises(UsageError, match="has a spacing, but its timesteps are chosen; use unipc"):
        table_at("unipc@shift=3", timesteps, TO_NOISE)


@pytest.mark.parametrize(
    ("sampler", "prediction", "message"),
    [
        ("unipc@shift=0", "flow_to_noise", "expected @shift=S with a number S above 0, such as un"),
        ("unipc@shift=nan", "flow", "expected @shift=S"),
        ("euler@shift=x", "flow", "expected @shift=S.*such as euler@shift=3"),
        ("euler@3", "flow", "expected @shift=S"),
        ("euler@", "flow", "expected @shift=S"),
        ("unipc@trailing", "flow_to_noise", "expected @shift=S"),
        (
            "unipc",
            "eps",
            "needs a model that predicts a flow, but this one predicts 'eps'; use ddim",
        ),
        ("ddim", "flow", "the clean sample, but this one predicts 'flow'; use euler or unipc"),
        ("unipc:3", "flow", "but this one predicts 'flow'"),
    ],
)
def test_wrong_samplers_of_flows_are_refused(sampler: str, prediction: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        sampler_table(sampler, 5, Process(prediction))
