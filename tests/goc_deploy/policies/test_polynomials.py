from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from goc_deploy.policies.polynomials import hermite_row, lagrange_row, taylor_row

STEPS = st.lists(st.integers(0, 30), min_size=1, max_size=4, unique=True).map(
    lambda s: sorted(s, reverse=True)
)


@given(STEPS, st.integers(1, 10), st.lists(st.floats(-3, 3), min_size=4, max_size=4))
def test_lagrange_is_exact_for_polynomials_of_its_order(
    computed: list[int], ahead: int, factors: list[float]
) -> None:
    def value(step: int) -> float:
        return sum(f * (step / 30) ** i for i, f in enumerate(factors[: len(computed)]))

    step = computed[0] + ahead
    found = sum(c * value(s) for c, s in zip(lagrange_row(computed, step), computed, strict=True))
    assert found == pytest.approx(value(step), rel=1e-6, abs=1e-6)


@given(STEPS, st.integers(1, 10))
@pytest.mark.parametrize("row", [lagrange_row, taylor_row, hermite_row])
def test_a_feature_that_never_changes_is_predicted_exactly(
    row: Any, computed: list[int], ahead: int
) -> None:
    assert sum(row(computed, computed[0] + ahead)) == pytest.approx(1, abs=1e-6)


@given(STEPS.filter(lambda s: len(s) >= 2), st.integers(1, 10))
def test_to_first_order_taylor_is_the_line_through_two_features(
    computed: list[int], ahead: int
) -> None:
    step = computed[0] + ahead
    assert taylor_row(computed[:2], step) == pytest.approx(lagrange_row(computed[:2], step))


def test_taylor_and_hermite_as_published_for_features_two_steps_apart() -> None:
    assert taylor_row([4, 2, 0], 5) == pytest.approx((1.625, -0.75, 0.125))
    assert hermite_row([4, 2, 0], 5) == pytest.approx((1.21875, -0.1875, -0.03125))
    assert taylor_row([8, 4, 0], 11) == pytest.approx((2.03125, -1.3125, 0.28125))
