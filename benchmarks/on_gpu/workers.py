"""Contenders in processes of their own that wait for their turn.

So rounds interleave, and a crash loses one contender only.

A worker answers with one line of JSON: first a description of itself, then a run for each name of a
contender that it reads.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.on_gpu.jobs import Job, last_line

Found = dict[str, Any]
SKIPPED = "skipped"  # key of an answer that says why the worker cannot take part here


class Worker:
    """The side that asks.

    Args:
        name: unique.
        command: starts the side that answers.
        log: file for what it prints.
    """

    def __init__(self, name: str, command: Sequence[str], log: Path) -> None:
        self.name, self.job = name, Job(name, command, log, pipes=True)
        self._answers: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        stdout = self.job.process.stdout
        assert stdout is not None
        for line in stdout:
            self._answers.put(line)
        self._answers.put("")

    def answer(self, limit_s: float) -> Found:
        """Its next answer.

        Raises:
            RuntimeError: it ended, or did not answer in time; it is ended then.
        """
        try:
            line = self._answers.get(timeout=max(limit_s, 0.01))
        except queue.Empty:
            self.job.kill()
            raise RuntimeError(
                f"no answer within {limit_s:.0f} s; its last line: {last_line(self.job.log)}"
            ) from None
        if not line:
            raise RuntimeError(self.job.finish(5).reason or "it ended without an answer")
        found: Found = json.loads(line)
        return found

    def run(self, contender: str, limit_s: float) -> Found:
        """One run of a contender.

        Raises:
            RuntimeError: as `answer`.
        """
        stdin = self.job.process.stdin
        assert stdin is not None
        try:
            stdin.write(contender + "\n")
            stdin.flush()
        except OSError:  # it ended; its answer says how
            pass
        return self.answer(limit_s)

    def close(self) -> None:
        """End it."""
        self.job.kill()
        self._reader.join(5)
        for pipe in (self.job.process.stdin, self.job.process.stdout):
            with contextlib.suppress(OSError):  # what was not sent to a process that is gone
                pipe.close()


def channel() -> Callable[[Found], None]:
    """The stream for the answers.

    Everything else that prints to standard output goes to standard error.
    """
    own = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def send(found: Found) -> None:
        own.write(json.dumps(found) + "\n")
        own.flush()

    return send


def serve(
    send: Callable[[Found], None], about: Found, contenders: Mapping[str, Callable[[], Found]]
) -> None:
    """Answer until the other side is gone.

    Each answer is about a second run, because the first gets the card from another process.
    """
    send({**about, "contenders": list(contenders)})
    for line in sys.stdin:
        run = contenders[line.strip()]
        run()
        send(run())
