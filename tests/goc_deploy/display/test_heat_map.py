from __future__ import annotations

from dataclasses import replace
from xml.etree import ElementTree

import pytest
from hypothesis import given

from goc_deploy.display.heat_map import COLORS, Label, Line, Rectangle, heat_map, svg_file
from goc_deploy.display.plans import prediction_name
from goc_deploy.policies.grammar import parse_policy
from goc_deploy.policies.resolve import schedule_from_policy
from goc_deploy.schedule import Schedule
from goc_deploy.spec import ModelSpec
from tests.goc_deploy.strategies import schedules

SPEC = ModelSpec(2, 8, 2, 16, 2, 2, 4, 10, False)


def made(text: str) -> Schedule:
    return schedule_from_policy(parse_policy(text), SPEC, 8)


def cells(schedule: Schedule) -> list[Rectangle]:
    return [mark for mark in heat_map(schedule).marks if isinstance(mark, Rectangle) and mark.tip]


def labels(schedule: Schedule, title: str = "") -> list[Label]:
    return [mark for mark in heat_map(schedule, title).marks if isinstance(mark, Label)]


@given(schedules())
def test_there_is_a_mark_per_run_of_equal_actions_and_everything_is_within(
    schedule: Schedule,
) -> None:
    def predicts(step: int, unit: int) -> str:
        action = schedule.action(step, unit)
        return action if action in ("compute", "reuse") else "predict"

    runs = sum(
        1 + sum(predicts(k, u) != predicts(k - 1, u) for k in range(1, schedule.steps))
        for u in range(schedule.units)
    )
    drawing = heat_map(schedule, "a title")
    assert len(cells(schedule)) == runs
    for mark in drawing.marks:
        assert isinstance(mark, Line) or (
            0 <= mark.x <= drawing.width and 0 <= mark.y <= drawing.height
        )
    ElementTree.fromstring(svg_file(drawing))


def test_block_0_is_at_the_top() -> None:
    heights = [label.y for label in labels(made("fora:2")) if label.anchor == "end"]
    assert heights == sorted(heights)
    assert (
        min(cells(made("fora:2")), key=lambda cell: (cell.y, cell.x)).tip
        == "step 0, block 0, attn: compute"
    )


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("fora:2+gc:0.5,history=computed", "gradient"),
        ("fora:2+steps:3,5:1", "gradient"),
        ("fora:2+lagrange:1", "Lagrange"),  # the same coefficients as the first
        ("fora:2+taylor:1", "Taylor"),
        ("fora:2+hermite:2", "Hermite"),
    ],
)
def test_the_legend_names_the_correction_and_not_the_form_of_its_coefficients(
    text: str, name: str
) -> None:
    assert [label.text for label in labels(made(text), "title")[:4]] == [
        "title",
        "compute",
        "reuse",
        name,
    ]
    assert {cell.tip.split(": ")[1] for cell in cells(made(text))} == {"compute", "reuse", name}


def test_a_schedule_that_does_not_tell_has_predictions() -> None:
    schedule = made("fora:2+lagrange:1")
    for policy in ("", "file:mine.json+gc", "a+b+c"):
        assert prediction_name(replace(schedule, policy=policy)) == "prediction"
    found = replace(
        schedule, policy="search:4", provenance={"search": {"correction": "lagrange:1"}}
    )
    assert prediction_name(found) == "Lagrange"


def test_what_god_decided_by_is_drawn_above() -> None:
    record = {"inverse_share": [0.5] * 8, "boundary": [2.0] * 8, "threshold": 0.7}
    drawing = heat_map(replace(made("fora:2+gc"), provenance={"god": record}))
    lines = [mark for mark in drawing.marks if isinstance(mark, Line)]
    assert [line.kind for line in lines] == ["inverse", "boundary", "threshold"]
    assert all(
        y < min(cell.y for cell in cells(made("fora:2"))) + 100
        for line in lines
        for _, y in line.points
    )
    assert {mark.kind for mark in drawing.marks if not isinstance(mark, Label)} <= COLORS.keys()
