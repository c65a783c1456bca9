"""What a command tells of its progress, on a terminal and elsewhere."""

from __future__ import annotations

import io
import re

from rich.console import Console

from goc_deploy.cli import progress
from goc_deploy.options import Progress


def test_without_a_terminal_there_is_a_line_every_30_seconds() -> None:
    lines: list[str] = []
    seconds = [0.0]
    show = progress.plain_lines(lines.append, lambda: seconds[0])
    for step in range(101):
        seconds[0] = float(step)
        show("steps of images 1-16", step, 400)
    assert lines == [
        "steps of images 1-16: 30 of 400, 1/s, 0:06:10 left",
        "steps of images 1-16: 60 of 400, 1/s, 0:05:40 left",
        "steps of images 1-16: 90 of 400, 1/s, 0:05:10 left",
    ]
    for unit in range(3):  # other work: the time left is counted from its own start
        seconds[0] = 110.0 + 10 * unit
        show(f"unit {unit}", unit, 3)
    assert lines[3:] == ["unit 1: 1 of 3, 0.1/s, 0:00:20 left"]


def test_short_work_writes_no_line() -> None:
    lines: list[str] = []
    show = progress.plain_lines(lines.append)
    for step in range(100):
        show("step", step, 100)
    assert lines == []


def test_the_bar_has_count_rate_and_time_left_in_80_columns() -> None:
    seconds = [0.0]
    text = io.StringIO()
    console = Console(
        file=text, force_terminal=True, width=80, color_system=None, get_time=lambda: seconds[0]
    )
    with progress.terminal_bar(console) as show:
        for step in range(11):
            seconds[0] = 6.0 * step
            show("quantisation of every block of the [model]", 1000 * step, 16000)
        show_now(console, show)
    frames = [
        line
        for line in re.split(r"[\r\n]", re.sub(r"\x1b\[[0-9?]*[A-Za-z]", "", text.getvalue()))
        if "/16000" in line
    ]
    assert frames
    assert all(len(frame) <= 80 for frame in frames)
    assert re.search(
        r"quantisation of every block…\s+\S+\s+10000/16000 +167/s +0:00:36", frames[-1]
    ), frames[-1]


def show_now(console: Console, show: Progress) -> None:
    """Draw the bar once more, without waiting for its next turn."""
    show("quantisation of every block of the [model]", 10000, 16000)
    assert console._live_stack  # the bar is still on the terminal
    console._live_stack[-1].refresh()
