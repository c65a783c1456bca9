"""The heat map of a schedule: one drawing, for `goc-plan --plot` and for the report of goc-eval.

Columns are steps, from left to right. Rows are units in execution order, with block 0 at the top.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby

from goc_deploy.display.plans import action_name, god_curves, prediction_name
from goc_deploy.schedule import Schedule

COLORS = {
    "compute": "#26517a",
    "reuse": "#c9d6e2",
    "predict": "#f2a541",
    "inverse": "#b23a48",
    "boundary": "#26517a",
    "threshold": "#808080",
}
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 6, 38
CELL_WIDTH, CELL_HEIGHT, MAX_WIDTH, LABEL_WIDTH = 14, 7, 640, 26
LINE_HEIGHT, CURVES_HEIGHT = 18, 60
FONT_SIZE, LETTER = 11, 6.2  # pixels, and approximate pixels per letter


@dataclass(frozen=True, slots=True)
class Rectangle:
    """A filled rectangle; ``kind`` is a key of ``COLORS``, ``tip`` the text of its tooltip."""

    kind: str
    x: float
    y: float
    width: float
    height: float
    tip: str = ""


@dataclass(frozen=True, slots=True)
class Label:
    """A line of text on the baseline (x, y).

    ``anchor`` is ``start``, ``middle`` or ``end``; ``upwards`` turns the text by 90 degrees.
    """

    text: str
    x: float
    y: float
    anchor: str = "middle"
    upwards: bool = False
    title: bool = False


@dataclass(frozen=True, slots=True)
class Line:
    """A line through points; ``kind`` is a key of ``COLORS``."""

    kind: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class Drawing:
    """Marks in pixels, y downwards."""

    width: float
    height: float
    marks: tuple[Rectangle | Label | Line, ...]


def heat_map(schedule: Schedule, title: str = "") -> Drawing:
    """Draw the action of every unit at every step; runs of equal actions are one mark.

    If GOD chose the steps, its N and B are drawn above.

    Args:
        schedule: the schedule to draw.
        title: text above the drawing; "" leaves the line out.
    """
    cell = min(CELL_WIDTH, MAX_WIDTH / schedule.steps)
    middles = [LEFT + cell * (step + 0.5) for step in range(schedule.steps)]
    keys = _keys(schedule)
    marks: list[Rectangle | Label | Line] = []
    top, legend_width = float(TOP), _legend_width([name for _, name in keys])
    if title:
        marks.append(Label(title, LEFT, top + 12, "start", title=True))
        top += LINE_HEIGHT
    marks += _legend(keys, top)
    top += LINE_HEIGHT
    if curves := god_curves(schedule):
        lines = _god_lines(schedule, curves)
        names = [(kind, name) for kind, name, _ in lines]
        legend_width = max(legend_width, _legend_width([name for _, name in names]))
        marks += _legend(names, top)
        top += LINE_HEIGHT + 6
        marks += [
            Label(str(value), LEFT - 8, top + CURVES_HEIGHT * (1 - value) + 4, "end")
            for value in (0, 1)
        ]
        for kind, _, values in lines:
            points = zip(
                middles, (top + CURVES_HEIGHT * (1 - value) for value in values), strict=True
            )
            marks.append(Line(kind, tuple(points)))
        top += CURVES_HEIGHT + 8
    marks += _cells(schedule, cell, top)
    width, height = cell * schedule.steps, float(CELL_HEIGHT * schedule.units)
    marks += _block_numbers(schedule, top)
    for step in range(0, schedule.steps, math.ceil(LABEL_WIDTH / cell)):
        marks.append(Label(str(step), middles[step], top + height + 15))
    axis = f"step (0 is the noisiest); rows of a block: {', '.join(schedule.branches)}"
    marks.append(Label(axis, LEFT, top + height + 32, "start", title=True))
    marks.append(Label("block", 24, top + height / 2, upwards=True, title=True))
    whole = max(
        LEFT + width + RIGHT, legend_width, LEFT + LETTER * max(len(title), len(axis)) + RIGHT
    )
    return Drawing(whole, top + height + BOTTOM, tuple(marks))


def _block_numbers(schedule: Schedule, top: float) -> list[Label]:
    """The number of each block beside the middle of its rows, as far as there is space."""
    labels: list[Label] = []
    first, free = 0, top
    for block, branches in enumerate(schedule.branches_of_blocks):
        middle = top + CELL_HEIGHT * (first + len(branches) / 2) + 4
        if middle - 4 >= free or not labels:
            labels.append(Label(str(block), LEFT - 8, middle, "end"))
            free = middle - 4 + FONT_SIZE
        first += len(branches)
    return labels


def svg(drawing: Drawing) -> str:
    """Write the drawing as an SVG element of a page, whose style sheet colours the marks."""
    return _svg(drawing, "", "")


def svg_file(drawing: Drawing) -> str:
    """Write the drawing as an SVG file, with its own colours and fonts."""
    rules = "".join(
        f"rect.{kind} {{ fill: {color} }} polyline.{kind} {{ stroke: {color} }} "
        for kind, color in COLORS.items()
    )
    text_style = f"text {{ font: {FONT_SIZE}px sans-serif; fill: #333333 }}"
    style = f"<style>{rules}polyline {{ fill: none }} {text_style}</style>"
    return _svg(drawing, ' xmlns="http://www.w3.org/2000/svg"', style) + "\n"


def _svg(drawing: Drawing, namespace: str, style: str) -> str:
    width, height = f"{drawing.width:.0f}", f"{drawing.height:.0f}"
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    marks = "".join(_svg_mark(mark) for mark in drawing.marks)
    label = 'role="img" aria-label="actions over steps and blocks"'
    return f"<svg{namespace} {size} {label}>{style}{marks}</svg>"


def _svg_mark(mark: Rectangle | Label | Line) -> str:
    if isinstance(mark, Line):
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in mark.points)
        return f'<polyline class="{mark.kind}" points="{points}"/>'
    if isinstance(mark, Label):
        turn = f' transform="rotate(-90 {mark.x:.1f} {mark.y:.1f})"' if mark.upwards else ""
        kind = ' class="title"' if mark.title else ""
        place = f'x="{mark.x:.1f}" y="{mark.y:.1f}" text-anchor="{mark.anchor}"'
        return f"<text{kind} {place}{turn}>{escape(mark.text)}</text>"
    place = f'x="{mark.x:.2f}" y="{mark.y:.2f}" width="{mark.width:.2f}" height="{mark.height:.2f}"'
    tip = f"<title>{escape(mark.tip)}</title>" if mark.tip else ""
    return f'<rect class="{mark.kind}" {place}>{tip}</rect>'


def _kind(schedule: Schedule, step: int, unit: int) -> str:
    action = schedule.action(step, unit)
    return action if action in ("compute", "reuse") else "predict"


def _keys(schedule: Schedule) -> list[tuple[str, str]]:
    """Return (kind, name) of every action of the schedule."""
    names = {"compute": "compute", "reuse": "reuse", "predict": prediction_name(schedule)}
    used = {
        _kind(schedule, step, unit)
        for step in range(schedule.steps)
        for unit in range(schedule.units)
    }
    return [(kind, name) for kind, name in names.items() if kind in used]


def _legend(keys: Sequence[tuple[str, str]], top: float) -> Iterator[Rectangle | Label]:
    x = float(LEFT)
    for kind, name in keys:
        yield Rectangle(kind, x, top + 3, 10, 10)
        yield Label(name, x + 16, top + 12, "start")
        x += 30 + LETTER * len(name)


def _legend_width(names: Sequence[str]) -> float:
    return LEFT + sum(30 + LETTER * len(name) for name in names) + RIGHT


def _god_lines(schedule: Schedule, curves: list[list[float]]) -> list[tuple[str, str, list[float]]]:
    """Return (kind, name, a value per step within 0..1) of the numbers that GOD compared."""
    lines = [
        ("inverse", "N, share of inverse units", curves[0]),
        ("boundary", "B, boundary", curves[1]),
    ]
    threshold = schedule.provenance["god"].get("threshold")
    if isinstance(threshold, (int, float)) and 0 <= threshold <= 1:
        lines.append(("threshold", "threshold", [float(threshold)] * schedule.steps))
    return [
        (kind, name, [min(max(value, 0.0), 1.0) for value in values])
        for kind, name, values in lines
    ]


def _cells(schedule: Schedule, cell: float, top: float) -> Iterator[Rectangle]:
    prediction = prediction_name(schedule)
    for unit in range(schedule.units):
        for kind, run in groupby(
            range(schedule.steps), key=lambda step: _kind(schedule, step, unit)
        ):
            steps = list(run)
            until = f" to step {steps[-1]}" if len(steps) > 1 else ""
            action = action_name(schedule, steps[0], unit, prediction)
            yield Rectangle(
                kind,
                LEFT + cell * steps[0],
                top + CELL_HEIGHT * unit,
                cell * len(steps) - 0.6,
                CELL_HEIGHT - 0.6,
                f"{schedule.place(steps[0], unit)}{until}: {action}",
            )
