from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from goc_deploy.errors import UsageError
from goc_deploy.samplers import SamplerTable, refined_table, sampler_table, table_at
from goc_deploy.samplers.process import Process
from goc_deploy.spec import DIFFUSION_PREDICTION_TYPES, PREDICTION_TYPES
from tests.reference import SIGNAL

FLOWS = ("flow", "flow_to_noise")


def _even(steps: int, prediction: str) -> SamplerTable:
    return sampler_table("euler" if prediction in FLOWS else "ddim", steps, Process(prediction))


@given(
    st.sampled_from(("ddim", "dpm++", "dpm++:1", "dpm++:3")),
    st.integers(1, 60),
    st.sampled_from(DIFFUSION_PREDICTION_TYPES),
)
def test_the_table_at_even_timesteps_is_that_of_the_sampler(
    sampler: str, steps: int, prediction: str
) -> None:
    even = sampler_table(sampler, steps, Process(prediction))
    assert table_at(sampler, even.timesteps, Process(prediction)) == even


@given(st.integers(1, 60), st.sampled_from(FLOWS))
def test_the_table_at_even_times_is_that_of_a_flow(steps: int, prediction: str) -> None:
    even = _even(steps, prediction)
    assert table_at("euler", even.timesteps, Process(prediction)) == even


def test_uneven_timesteps_are_visited_as_given() -> None:
    uneven = (999, 859, 722, 582, 441, 301, 169, 60)
    table = table_at("dpm++", list(map(float, uneven)), Process("eps"))
    assert table.timesteps == uneven
    assert [bool(row[0]) for row in table.lag_coefficients] == [False, *[True] * 6, False]


@given(
    st.sets(st.integers(0, 999), min_size=1, max_size=30),
    st.integers(1, 400),
    st.sampled_from(DIFFUSION_PREDICTION_TYPES),
)
def test_a_refined_table_visits_every_timestep_and_divides_the_steps_evenly(
    visited: set[int], steps: int, prediction: str
) -> None:
    timesteps = sorted(visited, reverse=True)
    steps = min(steps, timesteps[0] + 1)
    process = Process(prediction)
    refined, begins = refined_table(table_at("dpm++", timesteps, process), process, steps)
    assert refined.sampler == "ddim"
    assert steps <= refined.steps <= steps + len(timesteps)
    assert [refined.timesteps[begin] for begin in begins[:-1]] == timesteps
    assert begins[-1] == refined.steps
    most = (timesteps[0] + 1) / steps
    nodes = [*refined.timesteps, -1]
    for first, end in pairwise(begins):
        strides = [now - after for now, after in pairwise(nodes[first : end + 1])]
        assert min(strides) >= 1
        assert max(strides) - min(strides) <= 1
        assert sum(strides) / len(strides) <= most + 1e-9


@given(st.integers(1, 40), st.integers(1, 400), st.sampled_from(FLOWS))
def test_a_refined_flow_visits_every_time(steps: int, finer: int, prediction: str) -> None:
    table = _even(steps, prediction)
    refined, begins = refined_table(table, Process(prediction), finer)
    assert refined.steps >= finer
    assert refined.steps == len(set(refined.timesteps))
    assert tuple(refined.timesteps[begin] for begin in begins[:-1]) == table.timesteps
    assert begins[-1] == refined.steps


def _followed(table: SamplerTable, variance: float) -> list[float]:
    """Latents at each step, from 1, of the model that is exact for a normal clean sample."""
    x, kept, latents = 1.0, [0.0] * table.reach, [1.0]
    for k, told in enumerate(table.timesteps):
        if table.prediction_type in FLOWS:
            sigma = 1 - told if table.prediction_type == "flow" else told / 1000
            alpha = 1 - sigma
        else:
            alpha, sigma = np.sqrt(SIGNAL[int(told)]), np.sqrt(1 - SIGNAL[int(told)])
        total = alpha**2 * variance + sigma**2
        clean, eps = alpha * variance * x / total, sigma * x / total
        output = {
            "eps": eps,
            "v": alpha * eps - sigma * clean,
            "x0": clean,
            "flow": clean - eps,
            "flow_to_noise": eps - clean,
        }[table.prediction_type]
        estimate = table.estimate[k][0] * x + table.estimate[k][1] * output
        x = table.latent[k] * x + table.model[k] * output
        x += sum(w * d for w, d in zip(table.lag_coefficients[k], kept, strict=True))
        kept = [estimate, *kept][: table.reach]
        latents.append(x)
    return latents


@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
def test_a_refined_table_converges_on_a_linear_model(prediction: str) -> None:
    """The exact latents of a normal clean sample are in proportion to their standard deviation."""
    variance, process = 0.3, Process(prediction)
    table = _even(10, prediction)

    def deviation(told: float) -> float:
        if prediction in FLOWS:
            sigma = 1 - told if prediction == "flow" else told / 1000
            return float(np.sqrt((1 - sigma) ** 2 * variance + sigma**2))
        return float(np.sqrt(SIGNAL[int(told)] * variance + 1 - SIGNAL[int(told)]))

    deviations = np.array([*map(deviation, table.timesteps), np.sqrt(variance)])
    exact = deviations / deviations[0]

    def error(steps: int) -> float:
        refined, begins = refined_table(table, process, steps)
        return float(np.abs(np.array(_followed(refined, variance))[list(begins)] - exact).max())

    coarse = float(np.abs(np.array(_followed(table, variance)) - exact).max())
    assert error(250) < coarse / 10
    assert error(1000) < error(250) / 3


@pytest.mark.parametrize(
    ("sampler", "timesteps", "prediction", "message"),
    [
        ("ddim:1", (9, 3), "eps", "'ddim:1' draws fresh noise, which chosen timesteps do not"),
        ("ddpm", (9, 3), "eps", "'ddpm' draws fresh noise"),
        ("ddim@leading", (9, 3), "eps", "has a spacing, but its timesteps are chosen; use ddim"),
        ("diffusers", (9, 3), "eps", "is the scheduler of a pipeline's folder"),
        ("heun", (9, 3), "eps", "unknown sampler 'heun'"),
        ("euler", (9, 3), "eps", "needs a model that predicts a flow, but this one predicts 'eps'"),
        ("ddim", (3, 9), "eps", "'3, 9' must be whole numbers within 0..999, falling without"),
        ("ddim", (9, 9), "eps", "falling without repeats"),
        ("ddim", (), "eps", "timesteps '' must be whole numbers"),
        ("ddim", (9.5, 3), "eps", "must be whole numbers"),
        ("ddim", (1000, 3), "eps", "within 0..999"),
        ("euler", (0.5, 0.2), "flow", r"within \[0, 1\), rising without repeats"),
        ("euler", (0.5, 1.0), "flow", "rising"),
        ("euler", (1000, 0.0), "flow_to_noise", r"within \(0, 1000\], falling"),
    ],
)
def test_tables_that_cannot_be_made_are_refused(
    sampler: str, timesteps: tuple[float, ...], prediction: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        table_at(sampler, timesteps, Process(prediction))


def test_tables_that_cannot_be_refined_are_refused() -> None:
    process = Process("eps")
    table = sampler_table("ddim", 5, process)
    with pytest.raises(UsageError, match="draws fresh noise, so no converged solution has its"):
        refined_table(sampler_table("ddim:1", 5, process), process)
    with pytest.raises(UsageError, match=r"scales its latents by 14\.6, so they are not those of"):
        refined_table(replace(table, start=14.6), process)
    with pytest.raises(UsageError, match="predicts eps, the process is that of v"):
        refined_table(table, Process("v"))
    with pytest.raises(UsageError, match=r"refined to 1\.\.100 steps"):
        refined_table(table_at("ddim", (99, 3), process), process, 101)
    with pytest.raises(UsageError, match="whole numbers"):
        refined_table(replace(table, timesteps=(999, 749.5, 500, 250, 0)), process)
