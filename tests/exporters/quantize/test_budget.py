"""Choosing units within a bound, on plans whose errors are known vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from goc_deploy.errors import VerificationError
from goc_deploy.exporters.quantize.budget import Budget, affordable, budget_of
from goc_deploy.options import no_progress

CACHED = {"none": 0.0, "fora": 0.03}
ALONE = {"attn": 0.01, "mlp": 0.05, "attn_2": 0.02, "mlp_2": 0.04}
SAVED = {"attn": 100, "mlp": 400, "attn_2": 100, "mlp_2": 100}


def drawing(together: float = 1.0) -> Callable[[str | None, Sequence[str]], np.ndarray]:
    """Latents of two images of size 1, whose errors are orthogonal; more units cost more."""
    places = {name: i + 1 for i, name in enumerate([*CACHED, *ALONE])}

    def draw(plan: str | None, units: Sequence[str]) -> np.ndarray:
        latents = np.zeros((2, len(places) + 1))
        latents[:, 0] = 1
        if plan is not None:
            latents[:, places[plan]] = CACHED[plan]
        for unit in units:
            latents[:, places[unit]] = ALONE[unit] * (together if len(units) > 1 else 1)
        return latents

    return draw


def chosen(bound: float, together: float = 1.0) -> Budget:
    return budget_of(bound, list(CACHED), SAVED, drawing(together), no_progress)


def test_as_many_units_as_fit_are_chosen_in_the_order_of_a_step() -> None:
    everything = chosen(0.08)
    assert everything.units == tuple(ALONE)
    assert everything.judge == "fora"
    assert everything.cached == pytest.approx(CACHED)
    assert everything.alone == pytest.approx(ALONE, rel=1e-3)
    squares = sum(error**2 for error in ALONE.values())
    assert everything.total == pytest.approx(
        {plan: (error**2 + squares) ** 0.5 for plan, error in CACHED.items()}, rel=1e-3
    )


def test_every_plan_is_within_the_bound() -> None:
    for bound in (0.032, 0.04, 0.05, 0.06, 0.07):
        budget = chosen(bound)
        assert budget.units
        assert max(budget.total.values()) <= bound


def test_units_are_taken_back_if_they_cost_more_together() -> None:
    budget = chosen(0.08, together=1.5)
    assert 0 < len(budget.units) < len(ALONE)
    assert max(budget.total.values()) <= 0.08


def test_the_cheapest_per_byte_come_first_and_what_does_not_fit_is_skipped() -> None:
    assert affordable(ALONE, SAVED, 1.0) == ["attn", "attn_2", "mlp", "mlp_2"]
    assert affordable(ALONE, SAVED, 0.01**2 + 0.02**2 + 0.045**2) == ["attn", "attn_2", "mlp_2"]


def test_a_bound_below_the_error_of_a_plan_is_refused_with_that_error() -> None:
    message = r"`max_error=0.02` cannot be met: plan fora has error 0.03 on .* least that is reach"
    with pytest.raises(VerificationError, match=message):
        chosen(0.02)


def test_a_bound_with_room_for_no_unit_is_refused() -> None:
    message = r"leaves room for no quantised unit: .* error 0.03 .*, and attn alone .* by 0\.00\d+;"
    with pytest.raises(VerificationError, match=message):
        chosen(0.0301)
    # A unit seems to fit, but changes the plan more than its square says.
    draw = drawing()

    def worse(plan: str | None, units: Sequence[str]) -> np.ndarray:
        latents = draw(plan, units)
        if units and plan == "fora":
            latents[:, 2] += 0.01
        return latents

    with pytest.raises(VerificationError, match=r"the least that was reached is 0.0412"):
        budget_of(0.038, list(CACHED), SAVED, worse, no_progress)
