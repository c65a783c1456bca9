from __future__ import annotations

import numpy as np
import pytest

from goc_deploy.policies.least_squares import MAX_COEFFICIENT, NormalEquations, solve
from goc_deploy.schedule import REUSE


def seen(rows: np.ndarray, target: np.ndarray) -> NormalEquations:
    equations = NormalEquations.zeros(len(rows))
    for part in (slice(None, 50), slice(50, None)):  # as two batches
        equations.see([row[part] for row in rows], target[part])
    return equations


def test_coefficients_that_made_the_target_are_found() -> None:
    rows = np.random.default_rng(0).normal(size=(3, 200)).astype(np.float32)
    assert solve(seen(rows, np.array([1.8, -1.1, 0.3]) @ rows), 1e-8) == pytest.approx(
        [1.8, -1.1, 0.3], abs=1e-4
    )


def test_a_strong_ridge_gives_plain_reuse() -> None:
    rows = np.random.default_rng(0).normal(size=(2, 200)).astype(np.float32)
    assert solve(seen(rows, 2 * rows[0] - rows[1]), 1e9) == pytest.approx([1, 0], abs=1e-6)


def test_entries_that_cannot_be_told_apart_do_not_explode() -> None:
    row = np.random.default_rng(0).normal(size=200).astype(np.float32)
    rows = np.stack([row, row])
    assert sum(solve(seen(rows, row), 1e-6)) == pytest.approx(1, abs=1e-3)
    nearly = np.stack(
        [row, row + 1e-5 * np.random.default_rng(1).normal(size=200).astype(np.float32)]
    )
    target = row + 1e-3 * (nearly[1] - row) / 1e-5
    assert (
        solve(seen(nearly, target), 1e-15) == REUSE
        or max(map(abs, solve(seen(nearly, target), 1e-15))) <= MAX_COEFFICIENT
    )
    assert solve(seen(np.zeros((2, 200), np.float32), row), 1e-3)[1] == 0
