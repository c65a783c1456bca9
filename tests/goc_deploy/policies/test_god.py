from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from goc_deploy.policies.god import (
    boundaries,
    candidate_thresholds,
    decide,
    inverse_units,
    is_inverse,
    with_gradient_at,
)
from goc_deploy.schedule import COMPUTE, REUSE, Schedule, gradient

VALUES = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=6)
FORA = Schedule(1, ("attn", "mlp"), tuple(((REUSE if k % 2 else COMPUTE),) * 2 for k in range(8)))


def l1(d: np.ndarray, e: np.ndarray, eta: float) -> float:
    return float(np.abs(d - eta * e).sum())


@given(st.data())
def test_exists_agrees_with_a_search_over_eta(data: st.DataObject) -> None:
    """The best eta is a kink of the L1 error.

    The error is piecewise linear in eta with kinks at d / e: if any eta helps, one before the first
    kink does.
    """
    d = np.array(data.draw(VALUES))
    e = np.array(
        data.draw(st.lists(st.integers(-3, 3).map(float), min_size=len(d), max_size=len(d)))
    )
    etas = [1e-3, *(k / 50 for k in range(1, 400))]
    helps = any(l1(d, e, eta) < l1(d, e, 0) - 1e-12 for eta in etas)
    assert is_inverse(d, e, 1.0, "exists") == (not helps)


@given(
    VALUES, st.integers(7, 192).map(lambda n: n / 64)
)  # sums of such products are exact, so ties are ties
def test_at_eta_is_what_it_says_and_implies_exists(values: list[float], eta: float) -> None:
    d = np.array(values)
    e = np.roll(d, 1)
    inverse = is_inverse(d, e, eta, "at_eta")
    assert inverse == (l1(d, e, eta) >= l1(d, e, 0))
    assert inverse or not is_inverse(d, e, eta, "exists")


def test_a_steady_trend_is_positive_and_a_reversal_inverse() -> None:
    means = np.zeros((4, 2, 3, 5), np.float32)
    means[:, 0] = np.arange(4)[:, None, None]  # goes on
    means[:, 1] = np.array([0, 1, 0, 1])[:, None, None]  # turns back at every step
    for reading in ("exists", "at_eta"):
        assert inverse_units(means, 1.0, reading).tolist() == [
            [False, False],
            [False, False],
            [False, True],
            [False, True],
        ]


def test_the_boundary_mixes_position_and_inverse_share() -> None:
    inverse = np.array([[False, False], [False, True], [True, True], [True, True]])
    assert boundaries(inverse, 1.0).mean(axis=1).tolist() == [0, 0.25, 0.5, 0.75]
    assert boundaries(inverse, 0.0).mean(axis=1).tolist() == [0, 0.5, 1, 1]
    assert boundaries(inverse, 0.5).mean(axis=1).tolist() == [0, 0.375, 0.75, 0.875]


def test_the_gradient_is_used_below_the_threshold_where_history_allows() -> None:
    inverse = np.zeros((8, 2), bool)
    inverse[5, 1] = True
    everywhere = np.ones((8, 2), bool)
    made = decide(FORA, everywhere, inverse, 0.8, 0.0, 0.25).schedule.coefficients
    assert [made[k] for k in (1, 3, 5, 7)] == [
        (REUSE,) * 2,
        (gradient(0.8),) * 2,
        (REUSE,) * 2,
        (gradient(0.8),) * 2,
    ]
    own = decide(FORA, everywhere, inverse, 0.8, 0.0, 0.25, per_unit=True).schedule.coefficients
    assert own[5] == (gradient(0.8), REUSE)


def test_only_reused_units_with_two_entries_get_the_gradient() -> None:
    computed = Schedule(
        1, ("attn", "mlp"), ((COMPUTE,) * 2, (REUSE, COMPUTE), (REUSE,) * 2), "computed"
    )
    made = with_gradient_at(computed, np.ones((3, 2), bool), 1.0)
    assert made.coefficients == ((COMPUTE,) * 2, (REUSE, COMPUTE), (REUSE, gradient(1.0)))


@pytest.mark.parametrize("per_unit", [False, True])
def test_candidates_hold_plain_reuse_and_the_gradient_everywhere(per_unit: bool) -> None:
    inverse = np.random.default_rng(0).random((8, 2)) < 0.5
    thresholds = candidate_thresholds(FORA, inverse, 0.3, per_unit=per_unit, most=4)
    assert len(thresholds) <= 4
    everywhere = np.ones((8, 2), bool)
    made = [
        decide(FORA, everywhere, inverse, 1.0, 0.3, t, per_unit=per_unit).schedule
        for t in thresholds
    ]
    assert made[0] == FORA
    assert made[-1] == with_gradient_at(FORA, everywhere, 1.0)
