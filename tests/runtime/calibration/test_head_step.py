"""The fit of one step of a head."""

from __future__ import annotations

import numpy as np
import pytest

from goc_deploy.runtime.calibration import head_step
from goc_deploy.runtime.calibration.head_step import fit_step, residual_norms

IMAGES, CELLS, FEATURES, VALUES = 48, 6, 4, 2
HELD_OUT = np.arange(IMAGES) % 8 == 7
SIZES = np.full(IMAGES, 10.0)


def features() -> np.ndarray:
    draw = np.random.default_rng(0)
    return draw.normal(size=(IMAGES, CELLS, FEATURES)).astype(np.float32)


def noise(seed: int) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return draw.normal(size=(IMAGES, CELLS, VALUES)).astype(np.float32)


def linear(z: np.ndarray) -> np.ndarray:
    return np.asarray(z @ np.arange(FEATURES * VALUES, dtype=np.float32).reshape(FEATURES, VALUES))


def test_a_linear_target_is_found() -> None:
    z = features()
    fit = fit_step(z, linear(z), SIZES, HELD_OUT)
    assert residual_norms(z, linear(z), fit.weights).max() < 1e-4
    assert fit.held_out[1] < 1e-4 < fit.held_out[0]


def test_the_weights_are_zero_if_held_out_images_gain_nothing() -> None:
    z, r = features(), linear(features())
    r[HELD_OUT] *= -1
    fit = fit_step(z, r, SIZES, HELD_OUT)
    assert not fit.weights.any()
    assert fit.penalty is None
    assert fit.held_out[0] == fit.held_out[1]


def test_rounding_is_not_fitted() -> None:
    z = features()
    assert fit_step(z, linear(z) * 1e-9, SIZES, HELD_OUT).penalty is None


def test_held_out_images_change_only_the_penalty(monkeypatch: pytest.MonkeyPatch) -> None:
    z, r = features(), linear(features()) + noise(1)
    monkeypatch.setattr(head_step, "best_ridge", lambda train, _: (1e-3, train.solve(1e-3)))
    other = r.copy()
    other[HELD_OUT] += noise(2)[HELD_OUT]
    weights = [fit_step(z, one, SIZES, HELD_OUT).weights for one in (r, other)]
    np.testing.assert_array_equal(*weights)


def test_images_with_large_errors_do_not_rule() -> None:
    z, r = features(), linear(features())
    r[:3] = 50 * noise(3)[:3]
    fit = fit_step(z, r, SIZES, HELD_OUT)
    squares = np.linalg.lstsq(z.reshape(-1, FEATURES), r.reshape(-1, VALUES), rcond=None)[0]
    least = residual_norms(z, r, squares.astype(np.float32))[3:].mean()
    assert residual_norms(z, r, fit.weights)[3:].mean() < least / 10


def test_blocks_of_images_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    z, r = features(), linear(features()) + noise(1)
    whole = fit_step(z, r, SIZES, HELD_OUT)
    monkeypatch.setattr(head_step, "BLOCK_BYTES", 5 * CELLS * FEATURES * 8)
    parts = fit_step(z, r, SIZES, HELD_OUT)
    assert parts.penalty == whole.penalty
    np.testing.assert_allclose(parts.weights, whole.weights, rtol=1e-5, atol=1e-7)
