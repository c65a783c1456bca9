"""Ridge regression from streamed normal equations."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from goc_deploy.runtime.calibration.head_equations import RidgeEquations, best_ridge

FEATURES, VALUES = 5, 3
seeds = st.integers(0, 2**32 - 1)


def rows(seed: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features of very different scales, targets and weights."""
    draw = np.random.default_rng(seed)
    scales = 10.0 ** draw.integers(-3, 4, FEATURES)
    z, r = draw.normal(size=(count, FEATURES)) * scales, draw.normal(size=(count, VALUES))
    return z, r, draw.uniform(0.1, 3, count)


def streamed(z: np.ndarray, r: np.ndarray, w: np.ndarray, size: int) -> RidgeEquations:
    equations = RidgeEquations.zeros(z.shape[1], r.shape[1])
    for first in range(0, len(z), size):
        part = slice(first, first + size)
        equations.see(z[part], r[part], w[part])
    return equations


@given(seeds, st.integers(1, 50))
def test_the_streamed_solution_is_that_of_dense_least_squares(seed: int, size: int) -> None:
    z, r, w = rows(seed, 40)
    roots = np.sqrt(w)[:, None]
    expected = np.linalg.lstsq(z * roots, r * roots, rcond=None)[0]
    found = streamed(z, r, w, size).solve(1e-14)
    assert np.linalg.norm((found - expected) * np.abs(z).mean(axis=0)[:, None]) < 1e-8


@given(seeds, st.floats(1e-6, 10.0))
def test_the_streamed_solution_is_that_of_dense_ridge(seed: int, penalty: float) -> None:
    z, r, w = rows(seed, 40)
    roots = np.sqrt(w)[:, None]
    sizes = np.linalg.norm(z * roots, axis=0)
    stacked = np.concatenate([z * roots, np.diag(np.sqrt(penalty) * sizes)])
    zeros = np.zeros((FEATURES, VALUES))
    expected = np.linalg.lstsq(stacked, np.concatenate([r * roots, zeros]), rcond=None)[0]
    found = streamed(z, r, w, 7).solve(penalty)
    np.testing.assert_allclose(found * sizes[:, None], expected * sizes[:, None], atol=1e-8)


@given(seeds)
def test_the_loss_is_the_weighted_sum_of_squares(seed: int) -> None:
    z, r, w = rows(seed, 40)
    solution = np.random.default_rng(seed).normal(size=(FEATURES, VALUES))
    expected = float((w[:, None] * (r - z @ solution) ** 2).sum())
    assert np.isclose(streamed(z, r, w, 9).loss(solution), expected, rtol=1e-9)


@given(seeds, st.floats(1e-8, 10.0))
def test_features_that_are_zero_get_zero_weights_and_change_no_others(
    seed: int, penalty: float
) -> None:
    z, r, w = rows(seed, 40)
    wide = np.insert(z, [0, 3], 0.0, axis=1)
    found = streamed(wide, r, w, 40).solve(penalty)
    assert not found[[0, 4]].any()
    np.testing.assert_allclose(
        np.delete(found, [0, 4], axis=0), streamed(z, r, w, 40).solve(penalty)
    )


def test_scaling_a_feature_changes_no_prediction() -> None:
    z, r, w = rows(0, 40)
    scaled = z * np.array([1e4, 1, 1, 1e-4, 1])
    expected = z @ streamed(z, r, w, 40).solve(0.1)
    np.testing.assert_allclose(scaled @ streamed(scaled, r, w, 40).solve(0.1), expected, rtol=1e-9)


def test_held_out_rows_choose_the_penalty() -> None:
    z, r, w = rows(1, 8)  # noise, from which nothing can be learnt
    noise = streamed(z, r, w, 8)
    clean = streamed(z, z @ np.ones((FEATURES, VALUES)), w, 8)
    other_z, other_r, other_w = rows(2, 100)
    judge = streamed(other_z, other_r, other_w, 100)
    clean_judge = streamed(other_z, other_z @ np.ones((FEATURES, VALUES)), other_w, 100)
    assert best_ridge(noise, judge)[0] > best_ridge(clean, clean_judge)[0]
