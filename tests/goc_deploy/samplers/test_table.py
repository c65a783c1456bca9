from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from goc_deploy.compiler import check_plan, compile_schedule
from goc_deploy.errors import EngineDirError, UsageError
from goc_deploy.runtime.noise import image_noise
from goc_deploy.samplers import sampler_table
from goc_deploy.samplers.process import Process
from goc_deploy.samplers.solvers import SPACINGS, spaced_timesteps
from goc_deploy.schedule import Schedule
from goc_deploy.spec import DIFFUSION_PREDICTION_TYPES, ModelSpec
from tests.reference import SIGNAL


def test_twenty_steps_are_those_of_the_reference(golden: dict[str, np.ndarray]) -> None:
    assert list(reversed(spaced_timesteps(20))) == golden["timesteps"].tolist()


@given(st.integers(1, 1000))
def test_timesteps_fall_from_999_to_0_without_repeats(steps: int) -> None:
    found = spaced_timesteps(steps)
    assert len(set(found)) == steps
    assert found[0] == 999
    assert steps == 1 or found[-1] == 0
    assert list(found) == sorted(found, reverse=True)


def test_ddim_without_eta_draws_no_noise() -> None:
    assert not sampler_table("ddim", 20, Process("eps")).stochastic
    assert sampler_table("ddim:1", 20, Process("eps")).stochastic
    assert sampler_table("ddpm", 20, Process("eps")).stochastic
    assert not sampler_table("dpm++", 20, Process("eps")).stochastic


@given(st.sampled_from(SPACINGS), st.booleans(), st.integers(1, 999))
def test_every_spacing_falls_without_repeats_and_leaves_zero_out_if_asked(
    spacing: str, visits_zero: bool, steps: int
) -> None:
    found = spaced_timesteps(steps, spacing, visits_zero=visits_zero)
    assert len(set(found)) == steps
    assert list(found) == sorted(found, reverse=True)
    assert 0 <= found[-1] <= found[0] <= 999
    assert visits_zero or spacing == "trailing" or found[-1] > 0


# What diffusers 0.42 computes for five steps, found by feeding its schedulers unit vectors: weights
# of x, of the clean sample that the model predicts, then of earlier ones (dpm++) or of the noise
# and its spread (ddpm).
GOLDEN_ROWS = {
    "dpm++": [
        (0.9992538, 0.03279384, 0.0),
        (0.9877324, 0.1701022, -0.04789322),
        (0.9098639, 0.4069144, -0.1133166),
        (0.6527956, 0.7693162, -0.2463732),
        (0.0, 1.0, 0.0),
    ],
    "dpm++:3": [
        (0.9992538, 0.03279384, 0.0, 0.0),
        (0.9877324, 0.1701022, -0.04789322, 0.0),
        (0.9098639, 0.5024295, -0.2677241, 0.05889233),
        (0.6527956, 0.7693162, -0.2463732, 0.0),
        (0.0, 1.0, 0.0, 0.0),
    ],
    "ddpm": [
        (0.1093877, 0.05718902, 0.9931355, 0.0008289542),
        (0.1920268, 0.2678053, 0.9594262, 0.01940834),
        (0.200452, 0.6661861, 0.7828794, 0.1639872),
        (0.0001508916, 0.999841, 0.08316954, 2.118351),
        (0.0, 1.0, 0.0, 0.0),
    ],
}
GOLDEN_TIMESTEPS = {"dpm++": (999, 799, 599, 400, 200), "ddpm": (999, 749, 500, 250, 0)}


@pytest.mark.parametrize("sampler", GOLDEN_ROWS)
def test_tables_are_what_the_schedulers_of_diffusers_compute(sampler: str) -> None:
    """`test_samplers_diffusers` compares many more where diffusers is installed."""
    table = sampler_table(sampler, 5, Process("x0"))
    assert table.timesteps == GOLDEN_TIMESTEPS[sampler.partition(":")[0]]
    more = table.lag_coefficients if table.lags else zip(table.noise, table.spread, strict=True)
    rows = [(x, m, *rest) for x, m, rest in zip(table.latent, table.model, more, strict=True)]
    np.testing.assert_allclose(rows, GOLDEN_ROWS[sampler], rtol=1e-6)
    assert set(table.estimate) == {(0.0, 1.0)}


SAMPLERS = [
    "ddim",
    "ddim:0.7@trailing",
    "dpm++",
    "dpm++:1",
    "dpm++:3",
    "dpm++@leading",
    "ddpm",
    "ddpm@leading",
]


@given(st.sampled_from(SAMPLERS), st.integers(1, 60), st.sampled_from(DIFFUSION_PREDICTION_TYPES))
def test_a_perfect_model_keeps_a_sample_on_the_diffusion_path(
    sampler: str, steps: int, prediction: str
) -> None:
    """Every prediction type makes the same step.

    x = alpha * clean + sigma * eps goes to alpha' * clean + what the noise leaves of sigma'.
    """
    table, clean, eps = sampler_table(sampler, steps, Process(prediction)), 0.3, -1.7
    signal = [*(SIGNAL[t] for t in table.timesteps), 1.0]
    for k in range(steps):
        alpha, sigma = np.sqrt(signal[k]), np.sqrt(1 - signal[k])
        x = alpha * clean + sigma * eps
        output = {"eps": eps, "v": alpha * eps - sigma * clean, "x0": clean}[prediction]
        of_x, of_m = table.estimate[k]
        assert of_x * x + of_m * output == pytest.approx(clean, abs=1e-9)
        after = (
            table.latent[k] * x + table.model[k] * output + sum(table.lag_coefficients[k]) * clean
        )
        least_noise = table.noise[k] * np.exp(-table.spread[k])
        left = np.sqrt(max(0.0, 1 - signal[k + 1] - least_noise**2))
        assert after == pytest.approx(np.sqrt(signal[k + 1]) * clean + left * eps, abs=1e-8)


@given(st.integers(2, 300))
def test_the_learned_variance_lies_between_its_bounds(steps: int) -> None:
    table = sampler_table("ddpm", steps, Process("eps"))
    signal = [*(SIGNAL[t] for t in table.timesteps), 1.0]
    least = sampler_table("ddim:1", steps, Process("eps"))
    np.testing.assert_allclose(table.latent, least.latent, rtol=1e-9)
    np.testing.assert_allclose(table.model, least.model, rtol=1e-6, atol=1e-9)
    for k in range(steps - 1):
        assert table.noise[k] * np.exp(-table.spread[k]) == pytest.approx(least.noise[k])
        assert (table.noise[k] * np.exp(table.spread[k])) ** 2 == pytest.approx(
            1 - signal[k] / signal[k + 1]
        )
    assert (table.noise[-1], table.spread[-1]) == (0, 0)


def test_first_order_dpm_solver_is_ddim() -> None:
    one, ddim = (
        sampler_table("dpm++:1@trailing", 20, Process("eps")),
        sampler_table("ddim@trailing", 20, Process("eps")),
    )
    assert one.graph == ddim.graph == "sampler"
    np.testing.assert_allclose(one.rows, ddim.rows, rtol=1e-9, atol=1e-12)


def test_second_order_uses_one_earlier_estimate_in_all_but_the_first_and_last_step() -> None:
    table = sampler_table("dpm++", 20, Process("eps"))
    assert table.graph == "sampler_lag1"
    assert [bool(row[0]) for row in table.lag_coefficients] == [False, *[True] * 18, False]
    assert sampler_table("dpm++", 1, Process("eps")).graph == "sampler"


@pytest.mark.parametrize(
    ("sampler", "steps", "message"),
    [
        ("ddim", 0, "steps must be within 1..1000, got 0"),
        ("ddim", 1001, "got 1001"),
        ("dpm++", 1000, "steps must be within 1..999, got 1000"),
        ("heun", 20, "unknown sampler 'heun'; use ddim"),
        ("ddpm:1", 20, "unknown sampler 'ddpm:1'"),
        ("ddim:2", 20, "eta must be"),
        ("ddim:x", 20, "eta 'x' is not a number"),
        ("ddim:nan", 20, "eta must be"),
        ("dpm++:4", 20, "order must be 1, 2 or 3"),
        ("dpm++:", 20, "order '' is not a number"),
        ("ddim@log", 20, "unknown spacing 'log'; use linspace, leading, trailing"),
        ("ddim@", 20, "unknown spacing ''"),
    ],
)
def test_wrong_samplers_and_step_counts_are_refused(sampler: str, steps: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        sampler_table(sampler, steps, Process("eps"))


def test_predictions_that_are_unknown_or_not_the_models_are_refused() -> None:
    with pytest.raises(UsageError, match="unknown prediction type 'score'; use eps, v, x0"):
        sampler_table("ddim", 5, Process("score"))
    schedule = Schedule(1, ("attn", "mlp"), (((), ()),) * 5)
    learns = ModelSpec(1, 8, 2, 16, 2, 2, 4, 10, True)
    compile_schedule(schedule, learns, "ddpm")
    with pytest.raises(
        UsageError, match="needs the variance that this model does not predict; use ddim:1"
    ):
        compile_schedule(schedule, replace(learns, learn_sigma=False), "ddpm")
    with pytest.raises(UsageError, match="made for a model that predicts v, this one predicts eps"):
        compile_schedule(schedule, learns, sampler_table("ddim", 5, Process("v")))


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("latent", (1.0,), "columns of its sampler table differ in length"),
        ("lag_coefficients", ((0.0,) * 13,) * 5, "reach back the same 0 to 12 steps at every step"),
        (
            "lag_coefficients",
            ((0.0,), (), (), (), ()),
            "reach back the same 0 to 12 steps at every step",
        ),
        (
            "lag_coefficients",
            ((1.0, 0.0, 1.0, 1.0, 1.0),) * 5,
            "more than 3 earlier estimates in a step",
        ),
        ("spread", (1.0,) * 5, "both earlier estimates and a learned variance"),
        ("prediction_type", "v", "predicts v, this one predicts eps"),
    ],
)
def test_plans_with_a_malformed_table_are_not_executed(
    column: str, value: object, message: str
) -> None:
    spec = ModelSpec(1, 8, 2, 16, 2, 2, 4, 10, True)
    plan = compile_schedule(Schedule(1, ("attn", "mlp"), (((), ()),) * 5), spec, "dpm++")
    bad = replace(plan, sampler=replace(plan.sampler, **{column: value}))
    with pytest.raises(EngineDirError, match=message):
        check_plan(bad, spec)


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
