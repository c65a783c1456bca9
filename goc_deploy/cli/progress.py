"""Progress of a command on stderr: a bar on a terminal, elsewhere a line from time to time."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING

import click

from goc_deploy.cli.app import raise_if_interrupted
from goc_deploy.options import Progress

if TYPE_CHECKING:
    from rich.console import Console

LINE_SECONDS = 30.0


@contextlib.contextmanager
def progress_bar() -> Iterator[Progress]:
    """Show progress that is reported; reporting it also ends an interrupted command."""
    with terminal_bar() if sys.stderr.isatty() else contextlib.nullcontext(plain_lines()) as show:

        def progress(what: str, done: int, total: int) -> None:
            raise_if_interrupted()
            show(what, done, total)

        yield progress


def plain_lines(
    write: Callable[[str], None] = lambda line: click.echo(line, err=True),
    now: Callable[[], float] = time.monotonic,
) -> Progress:
    """Write a line every 30 seconds, of which short work sees none."""
    started = last = now()
    first, before, of = 0, 0, -1

    def show(what: str, done: int, total: int) -> None:
        nonlocal started, last, first, before, of
        if total != of or done < before:  # another piece of work
            started, first, of = now(), done, total
        before = done
        seconds = now() - started
        if now() - last < LINE_SECONDS:
            return
        last = now()
        line = f"{what}: {done} of {total}"
        if done > first and seconds:
            rate = (done - first) / seconds
            line += f", {rate:.3g}/s, {timedelta(seconds=round((total - done) / rate))} left"
        write(line)

    return show


@contextlib.contextmanager
def terminal_bar(console: Console | None = None) -> Iterator[Progress]:
    """A bar with count, rate and time left, in 80 columns."""
    from rich.console import Console as OwnConsole
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bar
    from rich.table import Column
    from rich.text import Text

    class RateColumn(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text(f"{speed:.3g}/s" if speed else "", style="progress.data.speed")

    columns = (
        TextColumn(
            "{task.description}",
            markup=False,
            table_column=Column(width=28, no_wrap=True, overflow="ellipsis"),
        ),
        BarColumn(bar_width=14),
        MofNCompleteColumn(),
        RateColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Bar(*columns, console=console or OwnConsole(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None, visible=False)
        before, of = 0, -1

        def show(what: str, done: int, total: int) -> None:
            nonlocal before, of
            if total != of or done < before:  # another piece of work, with a rate of its own
                bar.reset(task, total=total, completed=done, visible=True)
            before, of = done, total
            bar.update(task, description=what, completed=done)

        yield show
