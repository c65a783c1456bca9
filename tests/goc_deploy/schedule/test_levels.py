"""Schedules that predict the residual of whole steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given

from goc_deploy.errors import ScheduleError
from goc_deploy.schedule import Schedule, check_schedule
from goc_deploy.schedule.operations import schedule_flops
from goc_deploy.schedule.schedule import schedule_from_json, schedule_to_json
from goc_deploy.spec import ModelSpec
from tests.goc_deploy.strategies import residual_schedules

C, R, G = (), (1.0,), (1.5, -0.5)
WHOLE = Schedule(2, ("attn", "mlp"), ((C,) * 4, (R,) * 4), level="residual")


@given(residual_schedules())
def test_saving_and_loading_a_schedule_is_the_identity(schedule: Schedule) -> None:
    text = schedule_to_json(schedule)
    assert schedule_from_json(text.encode(), "s.json") == schedule
    check_schedule(schedule)


def test_a_file_without_a_level_predicts_units_and_an_unknown_level_is_refused() -> None:
    text = schedule_to_json(replace(WHOLE, level="unit"))
    assert "level" not in text
    assert schedule_from_json(text.encode(), "s.json").level == "unit"
    wrong = schedule_to_json(WHOLE).replace('"residual"', '"block"')
    with pytest.raises(ScheduleError, match=r"\$\.level: expected unit or residual, got 'block'"):
        schedule_from_json(wrong.encode(), "s.json")
    with pytest.raises(ScheduleError, match="level 'block' is not one of unit, residual"):
        check_schedule(replace(WHOLE, level="block"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ((R, R, C, R), "step 1, block 1, attn: compute, but the first unit of the step has coeff"),
        ((C, C, C, R), "step 1, block 1, mlp: coefficients 1, but the first unit .* has compute"),
        ((R, G, R, R), r"block 0, mlp: coefficients 1\.5 -0\.5, .*coefficients 1; level=residual"),
    ],
)
def test_units_of_a_step_that_differ_are_refused(step: tuple, message: str) -> None:
    schedule = replace(WHOLE, coefficients=((C,) * 4, step))
    with pytest.raises(ScheduleError, match=message):
        check_schedule(schedule)


def test_a_predicted_residual_costs_one_sum() -> None:
    spec = ModelSpec(2, 8, 2, 16, 2, 2, 4, 10, False)
    by_unit, whole = (
        schedule_flops(replace(WHOLE, level="unit"), spec, 2),
        schedule_flops(WHOLE, spec, 2),
    )
    assert by_unit - whole == 3 * 2 * 2 * spec.tokens * spec.hidden
