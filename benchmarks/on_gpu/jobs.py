"""Parts of a run as processes of their own, under one deadline.

If a part crashes or hangs, the others are not lost.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DONE, FAILED, TIMED_OUT, LEFT_OUT = "done", "failed", "timed out", "left out"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a part ended.

    Attributes:
        part: its name.
        state: ``done``, ``failed``, ``timed out`` or ``left out``.
        seconds: that it took.
        reason: why it is not done, in a sentence.
    """

    part: str
    state: str
    seconds: float = 0.0
    reason: str = ""


class Deadline:
    """When a run must be over.

    Args:
        seconds: from now on.
        clock: in seconds.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._end = clock, clock() + seconds

    @property
    def left(self) -> float:
        """Seconds until then, not below zero."""
        return max(0.0, self._end - self._clock())

    def limit(self, most: float, reserve: float = 0.0) -> float:
        """Seconds that a part may take: at most ``most``, keeping ``reserve`` for later parts."""
        return max(0.0, min(most, self.left - reserve))


class Job:
    """A process with a log of its own; ending it ends what it started.

    Args:
        name: of the part.
        command: what to run, in the project's root.
        log: file that its output goes to.
        pipes: keep its standard input and output open for `benchmarks.on_gpu.workers`; then only
            errors go to the log.
    """

    def __init__(
        self, name: str, command: Sequence[str], log: Path, *, pipes: bool = False
    ) -> None:
        self.name, self.log = name, log
        paths = [str(ROOT), os.environ.get("PYTHONPATH")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "NO_COLOR": "1",
        }
        self._started = time.monotonic()
        pipe = subprocess.PIPE if pipes else None
        with log.open("wb") as sink:
            self.process = subprocess.Popen(
                command,
                stdin=pipe or subprocess.DEVNULL,
                stdout=pipe or sink,
                stderr=sink,
                text=pipes or None,
                cwd=ROOT,
                env=environment,
                process_group=0,
            )

    def finish(self, limit_s: float) -> Outcome:
        """Wait for its end, and end it at the limit."""
        try:
            code = self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            self.kill()
            reason = (
                f"it was ended after {self.seconds:.0f} s; its last line: {last_line(self.log)}"
            )
            return Outcome(self.name, TIMED_OUT, self.seconds, reason)
        if code:
            return Outcome(
                self.name,
                FAILED,
                self.seconds,
                f"{_ending(code)}; its last line: {last_line(self.log)}",
            )
        return Outcome(self.name, DONE, self.seconds)

    @property
    def seconds(self) -> float:
        """Since it was started."""
        return time.monotonic() - self._started

    def kill(self) -> None:
        """End it and what it started; nothing if it is over."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def run_part(
    name: str,
    command: Sequence[str],
    log: Path,
    deadline: Deadline,
    limit_s: float,
    least_s: float = 5.0,
) -> Outcome:
    """Run a part, unless less time is left than it needs at least."""
    if deadline.left < least_s:
        reason = f"{deadline.left:.0f} s were left, and it needs at least {least_s:.0f}"
        return Outcome(name, LEFT_OUT, reason=reason)
    job = Job(name, command, log)
    try:
        return job.finish(deadline.limit(limit_s))
    finally:
        job.kill()


def last_line(log: Path) -> str:
    """The last line of a log that is not empty."""
    lines = [
        line.strip()
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines()
        if line.strip()
    ]
    return lines[-1][:300] if lines else "(none)"


def _ending(code: int) -> str:
    if code > 0:
        return f"exit code {code}"
    try:
        return f"ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"ended by signal {-code}"
