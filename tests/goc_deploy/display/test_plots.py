from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from PIL import Image

from goc_deploy.display import plots
from goc_deploy.display.heat_map import heat_map, svg_file
from goc_deploy.schedule import Schedule

SCHEDULE = Schedule(2, ("attn", "mlp"), (((),) * 4, ((1.0,),) * 4), policy="fora:2")


def test_a_picture_is_the_drawing_in_its_proportions(tmp_path: Path) -> None:
    drawing = heat_map(SCHEDULE, "a $title")
    plots.plot_schedule(SCHEDULE, "a $title", tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.width / picture.height == pytest.approx(
            drawing.width / drawing.height, rel=0.02
        )
    plots.plot_schedule(SCHEDULE, "a $title", tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").read_text() == svg_file(drawing)


def test_steps_are_whole_numbers_and_cached_ones_can_be_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Figure] = []

    def kept(**options: Any) -> Figure:
        figures.append(Figure(**options))
        return figures[-1]

    monkeypatch.setattr("matplotlib.figure.Figure", kept)
    plots.plot_step_times(
        [("none", [50.0] * 8), ("fora-2", [50.0, 0.3] * 4)], "engine", tmp_path / "times.png"
    )
    (axes,) = figures[0].axes
    assert axes.get_yscale() == "log"
    assert all(tick == round(tick) for tick in axes.get_xticks())
    low, high = (
        axes.transAxes.inverted().transform(axes.transData.transform((0, ms)))[1]
        for ms in (0.3, 50.0)
    )
    assert low > 0.01
    assert high - low > 0.5
