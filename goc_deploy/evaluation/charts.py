"""Charts as inline SVG. Colours are the page's CSS variables, for light and dark mode."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 520, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 12, 42
LOGARITHMIC_FROM = 5  # ratio of the largest value to the smallest
# CSS variables --c0 .. --c7; the next eight plans have hollow marks and dashed lines.
COLORS = 8


@dataclass(frozen=True, slots=True)
class Point:
    """A value ``y`` at ``x`` with the ends of its interval, which equal ``y`` without one."""

    x: float
    y: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Series:
    """The points of one plan, in its colour."""

    name: str
    color: int
    points: tuple[Point, ...]


@dataclass(frozen=True, slots=True)
class Axis:
    """An axis from ``low`` to ``high`` that covers the pixels ``start`` to ``stop``."""

    low: float
    high: float
    start: float
    stop: float
    logarithmic: bool

    def place(self, value: float) -> float:
        """Return the pixel of a value."""
        numbers = (self.low, self.high, value)
        low, high, at = map(math.log10, numbers) if self.logarithmic else numbers
        return self.start + (at - low) / (high - low) * (self.stop - self.start)

    def ticks(self) -> list[float]:
        """Round values within the axis: powers of ten times 1, 2 and 5, or about six multiples."""
        if self.logarithmic:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            factors = (1, 2, 5) if len(decades) <= 4 else (1,)
            ticks = [factor * 10.0**decade for decade in decades for factor in factors]
        else:
            raw = (self.high - self.low) / 6
            power = 10.0 ** math.floor(math.log10(raw))
            step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
            ticks = [
                step * i
                for i in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)
            ]
        return [tick for tick in ticks if self.low <= tick <= self.high]


def _axis(values: Sequence[float], start: float, stop: float, *, logarithmic: bool) -> Axis:
    low, high = min(values), max(values)
    if logarithmic:
        return Axis(low / 1.3, high * 1.3, start, stop, True)
    margin = 0.06 * (high - low) or max(abs(high), 1) * 0.1
    return Axis(low - margin, high + margin, start, stop, False)


def color_of(number: int) -> tuple[str, bool]:
    """Return the CSS colour of the plan with a number, and whether its marks are hollow."""
    return f"var(--c{number % COLORS})", number // COLORS % 2 == 1


def chart(series: Sequence[Series], x_title: str, y_title: str, *, lines: bool = False) -> str:
    """Draw lines, or points with their intervals, over two axes; every mark has a tooltip.

    Args:
        series: at least one point in all, ``y`` above 0.
        x_title: title of the horizontal axis.
        y_title: title of the vertical axis, which is logarithmic if the values differ much.
        lines: connect the points of a series.
    """
    points = [point for one in series for point in one.points]
    values = [p.y for p in points]
    logarithmic = max(values) > LOGARITHMIC_FROM * min(values)
    x = _axis([p.x for p in points], LEFT, WIDTH - RIGHT, logarithmic=False)
    ends = values if logarithmic else [end for p in points for end in (p.low, p.high)]
    y = _axis(ends, HEIGHT - BOTTOM, TOP, logarithmic=logarithmic)
    parts = _frame(x, y, x_title, y_title)
    for one in series:
        if lines:
            color, dashed = color_of(one.color)
            path = " ".join(f"{x.place(p.x):.1f},{y.place(p.y):.1f}" for p in one.points)
            dashes = ' stroke-dasharray="6 3"' if dashed else ""
            parts.append(
                f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"{dashes}/>'
            )
        parts += [_mark(one, p, x, y, 2.5 if lines else 5) for p in one.points]
    return _svg(WIDTH, HEIGHT, "".join(parts), f"{y_title} against {x_title}")


def _mark(series: Series, point: Point, x: Axis, y: Axis, radius: float) -> str:
    color, hollow = color_of(series.color)
    a, b = x.place(point.x), y.place(point.y)
    top, bottom = (y.place(min(max(end, y.low), y.high)) for end in (point.high, point.low))
    tip = escape(f"{series.name}: {point.x:g}, {point.y:.4g}")
    bar = (
        f'<line x1="{a:.1f}" x2="{a:.1f}" y1="{top:.1f}" y2="{bottom:.1f}" stroke="{color}"/>'
        if top < bottom
        else ""
    )
    paint = (
        f'fill="var(--panel)" stroke="{color}" stroke-width="2"' if hollow else f'fill="{color}"'
    )
    return (
        f'{bar}<circle cx="{a:.1f}" cy="{b:.1f}" r="{radius}" {paint}><title>{tip}</title></circle>'
    )


def _frame(x: Axis, y: Axis, x_title: str, y_title: str) -> list[str]:
    parts: list[str] = []
    for tick in x.ticks():
        at = x.place(tick)
        parts.append(
            f'<line class="rule" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        )
        parts.append(
            f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{tick:g}</text>'
        )
    for tick in y.ticks():
        at = y.place(tick)
        parts.append(
            f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
        )
        parts.append(f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{tick:g}</text>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text class="title" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" '
        f'text-anchor="middle">{escape(x_title)}</text>'
        f'<text class="title" x="14" y="{middle}" text-anchor="middle" '
        f'transform="rotate(-90 14 {middle})">{escape(y_title)}</text>'
    )
    return parts


def _svg(width: float, height: float, content: str, title: str) -> str:
    size = f'viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}"'
    return f'<svg {size} role="img" aria-label="{escape(title)}">{content}</svg>'
