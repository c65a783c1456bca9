from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from goc_deploy.errors import UsageError
from goc_deploy.noise import image_noise
from goc_deploy.samplers import sampler_table, spaced_timesteps


def test_twenty_steps_are_those_of_the_reference(golden: dict[str, np.ndarray]) -> None:
    assert list(reversed(spaced_timesteps(20))) == golden["timesteps"].tolist()


@given(st.integers(1, 1000))
def test_timesteps_fall_from_999_to_0_without_repeats(steps: int) -> None:
    found = spaced_timesteps(steps)
    assert len(set(found)) == steps
    assert found[0] == 999
    assert steps == 1 or found[-1] == 0
    assert list(found) == sorted(found, reverse=True)


@given(st.integers(2, 60), st.floats(0, 1))
def test_ddim_keeps_a_perfectly_predicted_sample_on_the_diffusion_path(steps: int, eta: float) -> None:
    """With x_t = sqrt(a) x_0 + sqrt(1-a) e and e predicted exactly, the signal of x_{t-1} is sqrt(a') and its variance 1 - a'."""
    signal = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    table = sampler_table(f"ddim:{eta}", steps)
    after = [*(signal[t] for t in table.timesteps[1:]), 1.0]
    for t, a_next, latent, model, noise in zip(
        table.timesteps, after, table.latent, table.model, table.noise, strict=True
    ):
        assert latent * np.sqrt(signal[t]) == pytest.approx(np.sqrt(a_next))
        assert (latent * np.sqrt(1 - signal[t]) + model) ** 2 + noise**2 == pytest.approx(1 - a_next, abs=1e-9)


def test_ddim_without_eta_draws_no_noise() -> None:
    assert not sampler_table("ddim", 20).stochastic
    assert sampler_table("ddim:1", 20).stochastic


@pytest.mark.parametrize(
    ("sampler", "steps", "message"),
    [
        ("ddim", 0, "steps must be within 1..1000, got 0"),
        ("ddim", 1001, "got 1001"),
        ("euler", 20, "unknown sampler"),
        ("ddim:2", 20, "eta must be"),
        ("ddim:x", 20, "not a number"),
    ],
)
def test_wrong_samplers_and_step_counts_are_refused(sampler: str, steps: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        sampler_table(sampler, steps)


def test_noise_depends_on_seed_and_image_alone() -> None:
    one = image_noise(3, 7, 1, (4, 8, 8))
    assert one.dtype == np.float32
    np.testing.assert_array_equal(one[0], image_noise(3, 7, 5, (4, 8, 8))[0])
    assert not np.array_equal(one, image_noise(3, 8, 1, (4, 8, 8)))
    assert not np.array_equal(one, image_noise(4, 7, 1, (4, 8, 8)))
    assert image_noise(0, 0, 1, (4, 64, 64)).std() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seeds_out_of_range_are_refused(seed: int) -> None:
    with pytest.raises(UsageError, match="seed must be"):
        image_noise(seed, 0, 1, (1, 2, 2))
