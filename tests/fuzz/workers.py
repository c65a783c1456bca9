"""Processes that try mutants.

One that crashes or hangs is a failure like any other, and another takes its place.
"""

from __future__ import annotations

import itertools
import logging
import math
import multiprocessing
import os
import random
import resource
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path

from goc_deploy.errors import GocError, ResourceError

Trial = Callable[[random.Random], object]
MakeTrials = Callable[[Path], Mapping[str, Trial]]
SLOW_SECONDS = 60.0  # of a processor: other work may keep a process waiting
STUCK_SECONDS = 1800.0
MAX_ADDRESS_SPACE = 16 * 2**30


@dataclass
class Tally:
    """What came of the mutants.

    Attributes:
        accepted: per kind, mutants that were used to the end.
        refused: per kind, mutants that raised an error of ours.
        failures: what went wrong otherwise, with the kind and the seed.
    """

    accepted: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    @property
    def mutants(self) -> int:
        """How many were tried."""
        return self.accepted.total() + self.refused.total() + len(self.failures)


@dataclass
class _Worker:
    """A process, its end of the pipe, and its mutant.

    Also when it began with that mutant, and the processor time that it had used then.
    """

    process: multiprocessing.process.BaseProcess
    results: Connection
    number: int
    kind: str = ""
    seed: int = 0
    since: float = 0.0
    used: float = 0.0

    @property
    def is_late(self) -> bool:
        waited = time.monotonic() - self.since
        if waited < SLOW_SECONDS:
            return False
        return waited > STUCK_SECONDS or self.processor_seconds() - self.used > SLOW_SECONDS

    def processor_seconds(self) -> float:
        """What the process has used since its start."""
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def tried(
    make_trials: MakeTrials,
    rarity: Mapping[str, int],
    folder: Path,
    *,
    processes: int,
    seed: int,
    seconds: float,
    mutants: float = math.inf,
    report: Callable[[Tally], None] = lambda _: None,
) -> Tally:
    """Try mutants of every kind until the time or their number is reached.

    Args:
        make_trials: makes the trials of a process in a folder; it must be importable.
        rarity: kind -> every how many seeds one is tried. No other kinds are tried.
        folder: each process has a folder in it.
        processes: that work at a time.
        seed: of the first mutants.
        seconds: when to stop.
        mutants: how many at most.
        report: called about once a second.
    """
    tally, numbers = Tally(), itertools.count()

    def started(first: int) -> _Worker:
        number = next(numbers)
        mine, theirs = multiprocessing.get_context("spawn").Pipe(duplex=False)
        more = (folder / str(number), theirs, first, processes)
        process = multiprocessing.get_context("spawn").Process(
            target=_work, args=(make_trials, dict(rarity), *more), daemon=True
        )
        process.start()
        theirs.close()
        return _Worker(process, mine, number, seed=first, since=time.monotonic())

    workers = [started(seed + i) for i in range(processes)]
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end and tally.mutants < mutants:
            ready = wait([worker.results for worker in workers], timeout=1.0)
            for i, worker in enumerate(workers):
                try:
                    if worker.results in ready:
                        _take(worker, tally)
                    if worker.is_late:
                        raise TimeoutError(f"took more than {SLOW_SECONDS:g} s")
                except (EOFError, TimeoutError) as cause:
                    worker.process.kill()
                    worker.process.join()
                    reason = str(cause) or f"ended the process ({worker.process.exitcode})"
                    tally.failures.append(
                        f"{worker.kind or 'start'}, --seed {worker.seed}: {reason}"
                    )
                    if not worker.kind:
                        return tally
                    workers[i] = started(worker.seed + processes)
            report(tally)
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.join()
    return tally


def _take(worker: _Worker, tally: Tally) -> None:
    """Take what a worker reports: (kind, seed) at the start of a mutant, then what came of it."""
    message = worker.results.recv()
    worker.since, worker.used = time.monotonic(), worker.processor_seconds()
    if isinstance(message, tuple):
        worker.kind, worker.seed = message
    elif message == "accepted":
        tally.accepted[worker.kind] += 1
    elif message == "refused":
        tally.refused[worker.kind] += 1
    else:
        tally.failures.append(f"{worker.kind}, --seed {worker.seed}: {message}")


def _work(
    make_trials: MakeTrials,
    rarity: Mapping[str, int],
    folder: Path,
    results: Connection,
    first: int,
    stride: int,
) -> None:
    """The life of a process."""
    resource.setrlimit(resource.RLIMIT_AS, (MAX_ADDRESS_SPACE, MAX_ADDRESS_SPACE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.disable(logging.ERROR)
    warnings.simplefilter("ignore")
    folder.mkdir()
    trials = make_trials(folder)
    for seed in itertools.count(first, stride):
        for kind in _due(rarity, seed):
            results.send((kind, seed))
            results.send(outcome(trials[kind], random.Random(f"{kind} {seed}")))


def _due(rarity: Mapping[str, int], seed: int) -> Iterable[str]:
    return (kind for kind, every in rarity.items() if seed % every == 0)


def outcome(trial: Trial, generator: random.Random) -> str:
    """``accepted``, ``refused``, or the failure.

    A failure is an error that is not ours, or memory that was full.

    An error of ours about memory is fine before anything is allocated; afterwards it comes from
    another.
    """
    try:
        trial(generator)
    except GocError as error:
        if isinstance(error, ResourceError) and error.__cause__ is not None:
            return traceback.format_exc(limit=-4)
        return "refused"
    except KeyboardInterrupt:
        raise
    except BaseException:  # a panic of a library in Rust is no Exception
        return traceback.format_exc(limit=-4)
    return "accepted"
