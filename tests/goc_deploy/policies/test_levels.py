"""The option ``level=residual``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from goc_deploy.errors import ScheduleError, UsageError
from goc_deploy.exporters.router import router_probabilities
from goc_deploy.policies.grammar import parse_policy
from goc_deploy.policies.resolve import schedule_from_policy
from goc_deploy.schedule import Schedule
from goc_deploy.spec import ModelSpec

SPEC = ModelSpec(2, 8, 2, 16, 2, 2, 4, 10, False)
CORRECTIONS = ("", "+gc:1.2", "+steps:3,5:0.8", "+taylor:1", "+lagrange:2", "+hermite:2")


def made(text: str, steps: int = 20) -> Schedule:
    return schedule_from_policy(parse_policy(text), SPEC, steps, read_router=router_probabilities)


@pytest.mark.parametrize("base", ["none", "fora:2", "fora:3@0.5,phase=last"])
@pytest.mark.parametrize("correction", CORRECTIONS)
def test_policies_that_treat_units_alike_may_predict_residuals(base: str, correction: str) -> None:
    name, comma, options = base.partition(",")
    text = f"{name}{correction}{comma}{options}"
    by_unit, whole = made(text), made(f"{text},level=residual")
    assert (by_unit.level, whole.level) == ("unit", "residual")
    assert whole.coefficients == by_unit.coefficients
    assert made(f"{text},level=unit") == replace(by_unit, policy=f"{text},level=unit")


def test_a_schedule_file_keeps_its_level_unless_the_spec_has_another(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    made("fora:2+lagrange:2,level=residual").save(path)
    assert made(f"file:{path}").level == "residual"
    assert made(f"file:{path},level=unit").level == "unit"


def test_policies_that_decide_by_unit_are_refused(tmp_path: Path) -> None:
    path, cells = tmp_path / "router.pt", torch.full((SPEC.units,), -9.0)
    cells[1] = 9.0
    torch.save({"routers": {f"{i}.prob": cells for i in range(4)}}, path)
    for correction in ("", "+gc"):
        text = f"l2c:{path}{correction},level=residual"
        with pytest.raises(ScheduleError) as caught:
            made(text, steps=4)
        assert str(caught.value) == (
            f"SPEC {text!r}: step 1, block 0, mlp: compute, but the first unit of the step has "
            "coefficients 1; level=residual predicts all units of a step as one, so use a policy "
            "that treats them alike, or leave out level=residual"
        )
    with pytest.raises(UsageError, match="option level must be unit or residual, got 'block'"):
        made("fora:2,level=block")
