from __future__ import annotations

import numpy as np
import pytest

from goc_deploy.metrics.estimate import bootstrap, exact, mean_estimate, resampled_estimate


def test_the_interval_of_a_mean_covers_it_in_about_95_of_100_samples() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for seed in range(100):
        found = mean_estimate(generator.exponential(size=60), seed)
        covered += found.low <= 1.0 <= found.high
    assert 88 <= covered <= 99


def test_the_same_seed_gives_the_same_interval() -> None:
    values = np.random.default_rng(1).random(50)
    assert mean_estimate(values, 3) == mean_estimate(values, 3)
    assert mean_estimate(values, 3) != mean_estimate(values, 4)


def test_one_image_has_no_interval() -> None:
    alone = mean_estimate(np.array([0.5]), 0)
    assert alone.low == alone.high
    assert resampled_estimate(2.0, [1.0]) == exact(2.0)


def test_a_biased_bootstrap_still_has_the_value_in_the_middle_of_its_interval() -> None:
    found = resampled_estimate(10.0, [12.0, 13.0, 14.0])
    assert found.low < 10.0 < found.high
    assert found.high - 10.0 == pytest.approx(1.959964)


def test_the_bootstrap_of_a_mean_has_its_standard_error() -> None:
    values = np.random.default_rng(2).normal(size=400)
    found = bootstrap(lambda chosen: float(values[chosen].mean()), 400, 200, 0)
    assert found.value == pytest.approx(values.mean())
    assert found.high - found.value == pytest.approx(1.96 * values.std() / 20, rel=0.2)
