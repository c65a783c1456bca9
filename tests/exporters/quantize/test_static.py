"""Scales and factors of quantised activations."""

from __future__ import annotations

import numpy as np
import pytest

from goc_deploy.errors import ModelError, VerificationError
from goc_deploy.exporters.quantize.static import best_alpha, product_error, static_input
from goc_deploy.exporters.quantize.statistics import (
    MAX_ROWS,
    SAMPLED,
    SUMMARY,
    InputStatistics,
)

K, N = 64, 48


def seen_of(x: np.ndarray) -> InputStatistics:
    """What calibration would see of rows (M, K), where M is a multiple of SAMPLED."""
    seen = InputStatistics(np.zeros(x.shape[1], np.float32))
    for rows in x.reshape(-1, SAMPLED, x.shape[1]):
        seen.add(np.concatenate([np.abs(rows).max(0)[None], np.abs(rows).sum(0)[None], rows]))
    return seen


def case(*, outliers: bool) -> tuple[InputStatistics, np.ndarray]:
    """Normal values; with outliers, three channels are fifty times as large."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((4 * SAMPLED, K)).astype(np.float32)
    if outliers:
        x[:, :3] *= 50
    return seen_of(x), rng.standard_normal((K, N)).astype(np.float32)


def relative(alpha: float | None, seen: InputStatistics, matrix: np.ndarray) -> float:
    error, size = product_error(static_input(seen, matrix, "float32", alpha), seen, matrix)
    return float(np.sqrt(error / size))


def test_a_product_of_normal_values_is_off_by_about_a_percent() -> None:
    assert 0.005 < relative(None, *case(outliers=False)) < 0.02


def test_factors_help_where_few_channels_are_large() -> None:
    seen, matrix = case(outliers=True)
    alpha = best_alpha([(seen, matrix)], "float32")
    assert alpha is not None
    assert relative(alpha, seen, matrix) < 0.8 * relative(None, seen, matrix)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_factors_do_not_change_the_product_before_rounding(dtype: str) -> None:
    seen, matrix = case(outliers=True)
    static = static_input(seen, matrix, dtype, 0.5)
    assert static.factors is not None
    smoothed = (seen.rows * static.factors) @ (matrix / static.factors[:, None])
    np.testing.assert_allclose(smoothed, seen.rows @ matrix, rtol=1e-3, atol=1e-3)


def test_a_single_outlier_is_clipped() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((8 * SAMPLED, K)).astype(np.float32)
    x[5, 5] = 12
    static = static_input(seen_of(x), np.ones((K, N), np.float32), "float32", None)
    assert 127 * static.scale == pytest.approx(12 * static.clip, rel=1e-5)
    assert static.clip < 0.95


def test_the_range_is_that_of_all_runs_and_the_samples_stay_few() -> None:
    x = np.ones((4 * MAX_ROWS, K), np.float32)
    x[40] = -9
    seen = seen_of(x)
    assert seen.runs == 4 * MAX_ROWS // SAMPLED
    assert (seen.largest == 9).all()
    assert len(seen.rows) <= MAX_ROWS


def test_values_that_are_not_finite_are_refused() -> None:
    seen = InputStatistics(np.zeros(K, np.float32))
    for value in (np.nan, np.inf):
        summary = np.ones((SUMMARY + SAMPLED, K), np.float32)
        summary[1, 3] = value
        with pytest.raises(VerificationError, match="infinite values or NaN"):
            seen.add(summary)


def test_zeros_have_no_range() -> None:
    seen = seen_of(np.zeros((SAMPLED, K), np.float32))
    with pytest.raises(ModelError, match="all values were zero"):
        seen.check()
