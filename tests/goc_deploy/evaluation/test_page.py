from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from goc_deploy.evaluation.charts import Axis, Point, Series, chart
from goc_deploy.evaluation.evaluate import Evaluation
from goc_deploy.evaluation.page import page
from goc_deploy.evaluation.tables import METRICS, cost_rows, distribution_rows, shown_value
from goc_deploy.schedule import Schedule

VOID = {"meta", "img"}


class Checker(HTMLParser):
    """Counts tags, and fails where they do not nest or lead out of the page."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.count: dict[str, int] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        assert tag not in ("script", "link", "iframe")
        for key, value in attrs:
            assert key != "href"
            assert key != "src" or (value or "").startswith("data:image/png;base64,")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, _attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def checked(text: str) -> dict[str, int]:
    checker = Checker()
    checker.feed(text)
    assert not checker.open
    return checker.count


def plan(computed: int, **values: float) -> dict[str, Any]:
    metrics = {
        key: {"value": value, "low": 0.9 * value, "high": 1.1 * value}
        for key, value in values.items()
    }
    return {
        "policy": "fora:2",
        "sampler": "ddim",
        "steps": 3,
        "baseline": "none",
        "computed_units": computed,
        "all_units": 6,
        "full_step_equivalents": computed / 2,
        "ms_per_image": 1.5 * computed,
        "step_errors": [0.0, 0.1, 0.2] if computed < 6 else None,
        "metrics": metrics,
    }


@pytest.fixture
def evaluation() -> Evaluation:
    plans = {
        "none": plan(6, fid=3.0),
        "<b>": plan(4, relative_l2=0.05, fid=4.0),
        "c": plan(4, relative_l2=0.5, fid=3.5),
    }
    options = {
        "cfg_scale": 4.0,
        "cfg_channels": 3,
        "seed": 0,
        "labels": "balanced",
        "reference": "r.npz",
        "trajectory_images": 5,
    }
    found = {
        "images": 7,
        "precision": "fp32",
        "machine": {"backend": "onnxruntime"},
        "features": "f.onnx",
        "resamples": 5,
        "options": options,
        "warnings": ["mind the <gap>"],
        "goc_deploy": "0",
        "plans": plans,
    }
    rows = (((), ()), ((1.0,), ()), ((1.0,), ()))
    schedule = Schedule(1, ("attn", "mlp"), rows)
    pictures = {name: np.zeros((2, 12, 12, 1), np.uint8) for name in plans}
    return Evaluation(found, dict.fromkeys(plans, schedule), pictures)


def test_the_page_nests_needs_nothing_else_and_escapes_names(evaluation: Evaluation) -> None:
    text = page(evaluation, "engine & co")
    count = checked(text)
    assert "http" not in text
    assert "@import" not in text
    assert "url(" not in text
    assert count["img"] == 3
    assert count["svg"] == 3 + 4 + 1  # heat maps, two metrics by two costs, errors over steps
    assert "b" not in count
    assert "engine &amp; co" in text
    assert "mind the &lt;gap&gt;" in text


def marked(evaluation: Evaluation) -> list[str]:
    cells = page(evaluation, "engine").split('<td class="best">')[1:]
    return [cell.split("</td>")[0].split(" ")[0] for cell in cells]


def test_the_best_plan_that_caches_is_marked(evaluation: Evaluation) -> None:
    evaluation.report["plans"]["c"]["metrics"]["fid"] = {"value": 2.5, "low": 2.0, "high": 3.0}
    assert marked(evaluation) == ["0.0500", "2.500"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((3.5, 3.1, 3.9), (4.0, 3.8, 4.2)),  # intervals overlap
        ((1.0, 1.0, 1.0), (1.0, 1.0, 1.0)),  # all equal
        ((3.5, 3.5, 3.5), (4.0, 4.0, 4.0)),  # no intervals
    ],
)
@pytest.mark.parametrize("metric", ["fid", "agreement"])
def test_no_plan_is_the_best_within_the_noise(
    one: tuple[float, ...], other: tuple[float, ...], metric: str, evaluation: Evaluation
) -> None:
    for name, values in (("<b>", other), ("c", one)):
        estimate = dict(zip(("value", "low", "high"), values, strict=True))
        evaluation.report["plans"][name]["metrics"] = {metric: estimate}
    assert marked(evaluation) == []


def test_options_without_a_value_are_left_out(evaluation: Evaluation) -> None:
    evaluation.report["options"]["plans"] = ()
    assert "plans" not in page(evaluation, "engine").split("<dt>options</dt>")[1]
    evaluation.report["options"]["plans"] = ("none", "fora-2")
    assert "plans none, fora-2;" in page(evaluation, "engine").replace("</dd>", ";")


def test_a_page_without_images_or_distances_is_whole_too(evaluation: Evaluation) -> None:
    found = {**evaluation.report, "plans": {"none": plan(6)}, "features": None}
    count = checked(page(Evaluation(found, {"none": evaluation.schedules["none"]}, {}), "engine"))
    assert "img" not in count
    assert count["svg"] == 1


def test_sixteen_plans_look_different() -> None:
    def look(number: int) -> str:
        return chart(
            (Series("plan", number, (Point(0, 1, 1, 1), Point(1, 2, 2, 2))),), "x", "y", lines=True
        )

    assert len({look(number) for number in range(16)}) == 16


@given(st.floats(1e-6, 1e6), st.floats(1.2, 1e4), st.booleans())
def test_an_axis_keeps_its_ticks_and_values_within_its_pixels(
    low: float, factor: float, logarithmic: bool
) -> None:
    axis = Axis(low, low * factor, 100.0, 20.0, logarithmic)
    for tick in axis.ticks():
        assert 20 - 1e-6 <= axis.place(tick) <= 100 + 1e-6
    assert axis.place(low) == pytest.approx(100)
    assert axis.place(low * factor) == pytest.approx(20)
    assert logarithmic or len(axis.ticks()) >= 2


@given(st.lists(st.floats(1e-5, 1e3), min_size=1, max_size=6), st.booleans())
def test_charts_of_any_values_are_whole(values: list[float], lines: bool) -> None:
    points = tuple(Point(float(i), v, 0.5 * v, 2 * v) for i, v in enumerate(values))
    text = chart([Series("a", 0, points)], "x", "y", lines=lines)
    assert checked(text)["circle"] == len(values)
    assert "nan" not in text


def test_tables_show_values_with_half_their_interval(evaluation: Evaluation) -> None:
    columns, rows = cost_rows(evaluation.report)
    assert columns == ["plan", "steps", "full steps", "ms/image", "relative L2"]
    assert rows[1] == ["<b>", "3", "2.00", "6.0", "0.0500 +-0.0050"]
    assert rows[0][-1] == ""
    assert distribution_rows(evaluation.report)[1][0] == ["none", "3.000 +-0.300"]
    kid = next(metric for metric in METRICS if metric.key == "kid")
    assert (
        shown_value({"value": 211.248040, "low": 211.248040, "high": 211.248040}, kid) == "211.248"
    )
    assert shown_value({"value": 0.0, "low": 0.0, "high": 0.0}, kid) == "0.00000"


def test_a_preset_has_the_columns_of_papers(evaluation: Evaluation) -> None:
    for (name, entry), method in zip(
        evaluation.report["plans"].items(), ("no cache", "A", "B & C"), strict=True
    ):
        entry |= {"method": method, "flops_per_image": 2e12 if name == "none" else 1.5e12}
    columns, rows = cost_rows(evaluation.report)
    assert columns == ["method", "plan", "caching level %", "FLOPs (T)", "speed-up", "relative L2"]
    assert rows[0] == ["no cache", "none", "0.0", "2", "1.00", ""]
    assert rows[1] == ["A", "<b>", "33.3", "1.5", "1.50", "0.0500 +-0.0050"]
    assert distribution_rows(evaluation.report)[1][1][:2] == ["A", "<b>"]
    text = page(evaluation, "engine")
    checked(text)
    assert "<td>&lt;b&gt;</td><td>33.3</td><td>1.5</td><td>1.50</td>" in text
    assert "B &amp; C</td>" in text
