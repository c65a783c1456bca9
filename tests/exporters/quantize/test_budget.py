"""Choosing units within a bound, on plans whose errors are known vectors."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from goc_deploy.errors import VerificationError
from goc_deploy.exporters.quantize.budget import Budget, Draw, affordable, budget_of
from goc_deploy.options import no_progress
from goc_deploy.precision import WeightFormat

CACHED = {"none": 0.0, "fora": 0.03}
ALONE = {"attn": 0.01, "mlp": 0.05, "attn_2": 0.02, "mlp_2": 0.04}
SAVED = {"attn": 100, "mlp": 400, "attn_2": 100, "mlp_2": 100}
FINER: dict[WeightFormat, float] = {"w4": 1.0, "w8": 0.1}  # of the error, and half of the bytes


def drawing(together: float = 1.0) -> Draw:
    """Latents of two images of size 1, whose errors are orthogonal; more units cost more."""
    places = {name: i + 1 for i, name in enumerate([*CACHED, *ALONE])}

    def draw(plan: str | None, formats: Mapping[str, WeightFormat]) -> np.ndarray:
        latents = np.zeros((2, len(places) + 1))
        latents[:, 0] = 1
        if plan is not None:
            latents[:, places[plan]] = CACHED[plan]
        for unit, wanted in formats.items():
            error = ALONE[unit] * FINER[wanted] * (together if len(formats) > 1 else 1)
            latents[:, places[unit]] = error
        return latents

    return draw


def saved(*formats: WeightFormat) -> dict[str, dict[WeightFormat, int]]:
    return {
        unit: {wanted: size if wanted == "w4" else size // 2 for wanted in formats}
        for unit, size in SAVED.items()
    }


def chosen(bound: float, together: float = 1.0, *formats: WeightFormat) -> Budget:
    sizes = saved(*(formats or ("w4",)))
    return budget_of(bound, list(CACHED), sizes, drawing(together), no_progress)


def test_as_many_units_as_fit_are_chosen_in_the_order_of_a_step() -> None:
    everything = chosen(0.08)
    assert list(everything.formats.items()) == [(unit, "w4") for unit in ALONE]
    assert everything.judge == "fora"
    assert everything.cached == pytest.approx(CACHED)
    for unit, error in ALONE.items():
        assert everything.alone[unit] == pytest.approx({"w4": error}, rel=1e-3)
    squares = sum(error**2 for error in ALONE.values())
    assert everything.total == pytest.approx(
        {plan: (error**2 + squares) ** 0.5 for plan, error in CACHED.items()}, rel=1e-3
    )


@pytest.mark.parametrize("formats", [("w4",), ("w8", "w4")])
def test_every_plan_is_within_the_bound(formats: tuple[WeightFormat, ...]) -> None:
    for bound in (0.032, 0.04, 0.05, 0.06, 0.07):
        budget = chosen(bound, 1.0, *formats)
        assert budget.formats
        assert max(budget.total.values()) <= bound


def test_units_that_do_not_fit_in_the_smallest_format_get_a_finer_one() -> None:
    budget = chosen(0.05, 1.0, "w4", "w8")
    assert dict(budget.formats) == {"attn": "w4", "mlp": "w8", "attn_2": "w4", "mlp_2": "w8"}
    for unit, error in ALONE.items():
        assert budget.alone[unit] == pytest.approx({"w4": error, "w8": error / 10}, rel=1e-3)
    assert set(chosen(0.08, 1.0, "w4", "w8").formats.values()) == {"w4"}
    # Without the finer format, this unit would stay in the precision.
    assert "mlp_2" not in chosen(0.05).formats


def test_steps_are_taken_back_if_units_cost_more_together() -> None:
    budget = chosen(0.08, together=1.5)
    assert 0 < len(budget.formats) < len(ALONE)
    assert max(budget.total.values()) <= 0.08
    ladder = chosen(0.08, 1.5, "w4", "w8")
    assert set(ladder.formats) == set(ALONE)
    assert set(ladder.formats.values()) == {"w4", "w8"}
    assert max(ladder.total.values()) <= 0.08


def test_the_cheapest_per_byte_come_first_and_what_does_not_fit_is_skipped() -> None:
    alone: dict[str, dict[WeightFormat, float]] = {u: {"w4": error} for u, error in ALONE.items()}
    everything = affordable(alone, saved("w4"), 1.0)
    assert everything == [(unit, "w4") for unit in ("attn", "attn_2", "mlp", "mlp_2")]
    squares = 0.01**2 + 0.02**2 + 0.045**2
    assert [unit for unit, _ in affordable(alone, saved("w4"), squares)] == [
        "attn",
        "attn_2",
        "mlp_2",
    ]


def test_a_format_that_saves_no_more_than_another_is_taken_only_if_it_errs_less() -> None:
    alone: dict[str, dict[WeightFormat, float]] = {"attn": {"int8": 0.02, "int8+smooth": 0.01}}
    sizes: dict[str, dict[WeightFormat, int]] = {"attn": {"int8": 101, "int8+smooth": 100}}
    assert affordable(alone, sizes, 0.01**2) == [("attn", "int8+smooth")]
    assert affordable(alone, sizes, 0.02**2) == [("attn", "int8+smooth"), ("attn", "int8")]
    equal: dict[str, dict[WeightFormat, int]] = {"attn": {"int8": 100, "int8+smooth": 100}}
    assert affordable(alone, equal, 1.0) == [("attn", "int8+smooth")]


def test_a_bound_below_the_error_of_a_plan_is_refused_with_that_error() -> None:
    message = r"`max_error=0.02` cannot be met: plan fora has error 0.03 on .* least that is reach"
    with pytest.raises(VerificationError, match=message):
        chosen(0.02)


def test_a_bound_with_room_for_no_unit_is_refused() -> None:
    message = r"room for no quantised unit: .* error 0.03 .*, and attn alone in w4 .* by 0\.00\d+;"
    with pytest.raises(VerificationError, match=message):
        chosen(0.0301)
    # A unit seems to fit, but changes the plan more than its square says.
    draw = drawing()

    def worse(plan: str | None, formats: Mapping[str, WeightFormat]) -> np.ndarray:
        latents = draw(plan, formats)
        if formats and plan == "fora":
            latents[:, 2] += 0.01
        return latents

    with pytest.raises(VerificationError, match=r"the least that was reached is 0.0412"):
        budget_of(0.038, list(CACHED), saved("w4"), worse, no_progress)
