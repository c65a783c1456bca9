"""Plots as files; PNG and PDF need the ``plot`` extra."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from goc_deploy.disk import written
from goc_deploy.display.heat_map import COLORS, FONT_SIZE, Drawing, Label, Line, heat_map, svg_file
from goc_deploy.errors import EnvironmentUnsupportedError
from goc_deploy.schedule import Schedule

POINTS_PER_INCH = 72  # a pixel of a drawing is a point
DOTS_PER_INCH = 160
ALIGNMENT = {"start": "left", "middle": "center", "end": "right"}


def make_figure(**options: Any) -> Any:
    """Create a figure of matplotlib, which needs no screen.

    Raises:
        EnvironmentUnsupportedError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as cause:
        raise EnvironmentUnsupportedError(
            "plots need matplotlib; run: pip install 'goc_deploy[plot]'"
        ) from cause
    return Figure(**options)


def plot_schedule(schedule: Schedule, title: str, path: Path) -> None:
    """Write `goc_deploy.display.heat_map.heat_map` as SVG, or with matplotlib as PNG or PDF.

    Raises:
        EnvironmentUnsupportedError: PNG or PDF is wanted, and matplotlib is not installed.
    """
    drawing = heat_map(schedule, title)
    if path.suffix == ".svg":
        with written(path) as temporary:
            temporary.write_text(svg_file(drawing), encoding="utf-8")
        return
    figure = _figure_of(drawing)
    with written(path) as temporary:
        figure.savefig(temporary, dpi=DOTS_PER_INCH)


def _figure_of(drawing: Drawing) -> Any:
    figure = make_figure(
        figsize=(drawing.width / POINTS_PER_INCH, drawing.height / POINTS_PER_INCH)
    )
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, drawing.width), ylim=(drawing.height, 0))
    axes.set_axis_off()
    from matplotlib.patches import Rectangle

    for mark in drawing.marks:
        if isinstance(mark, Line):
            axes.plot(*zip(*mark.points, strict=True), color=COLORS[mark.kind], linewidth=1)
        elif isinstance(mark, Label):
            axes.text(
                mark.x,
                mark.y,
                mark.text,
                ha=ALIGNMENT[mark.anchor],
                va="baseline" if not mark.upwards else "center",
                rotation=90 * mark.upwards,
                fontsize=FONT_SIZE,
                color="#333333",
                parse_math=False,
            )
        else:
            shape = Rectangle(
                (mark.x, mark.y), mark.width, mark.height, facecolor=COLORS[mark.kind], linewidth=0
            )
            axes.add_patch(shape)
    return figure


def plot_step_times(rows: Sequence[tuple[str, Sequence[float]]], title: str, path: Path) -> None:
    """Plot the median milliseconds of every step, one line per plan.

    The scale is logarithmic, because a full step can take a hundred times as long as a cached one.
    """
    figure = make_figure(figsize=(9, 4.5), layout="constrained")
    from matplotlib.ticker import MaxNLocator

    axes = figure.subplots()
    for name, milliseconds in rows:
        axes.plot(range(len(milliseconds)), milliseconds, marker="o", markersize=3, label=name)
    axes.set(xlabel="step", ylabel="median time of the step (ms)", yscale="log", title=title)
    axes.xaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10], integer=True))
    axes.yaxis.set_major_formatter("{x:g}")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    with written(path) as temporary:
        figure.savefig(temporary, dpi=120)
