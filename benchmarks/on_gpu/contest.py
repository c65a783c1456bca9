"""Our plans beside PyTorch, eager and compiled, in rounds that interleave over processes."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.on_gpu.exports import PLANS, Subject
from benchmarks.on_gpu.jobs import Deadline
from benchmarks.on_gpu.results import COMPILED, Found, summary
from benchmarks.on_gpu.workers import SKIPPED, Worker

ROUNDS = 9
FOR_ROUNDS = 15.0  # seconds that are kept for them while workers start
MODES = {"pytorch": "eager", COMPILED: "default", f"{COMPILED} reduce-overhead": "reduce-overhead"}


def contest(
    subject: Subject,
    engines: Path,
    work: Path,
    images: int,
    backends: Sequence[str],
    deadline: Deadline,
    *,
    trace: Path,
    graphs: bool,
    dry: bool,
) -> Found:
    """One number of images: who took how long.

    Contenders that cannot run here are ``skipped``. Those that ended or did not answer are
    ``failed``. Both have a reason.

    Args:
        subject: the model.
        engines: folder of its engine directory and weights.
        work: folder for logs and latents.
        images: N.
        backends: of ours.
        deadline: when to be over.
        trace: where to write a Chrome trace of the first backend's plans.
        graphs: replay CUDA graphs.
        dry: on the CPU, one round.
    """
    noise = work / f"noise-{images}.npy"
    np.save(
        noise,
        np.random.default_rng(0).standard_normal((images, 4, *_sides(subject))).astype(np.float32),
    )
    commands: dict[str, list[str]] = {}
    for backend in backends:
        words = ["benchmarks.on_gpu.ours", str(engines / subject.folder), "--backend", backend]
        words += [word for plan in (*PLANS, "many") for word in ("--plan", plan)]
        words += ["--trace", str(trace)] if backend == backends[0] else []
        commands[backend] = [*words, *([] if graphs else ["--no-cuda-graphs"])]
    for name, mode in MODES.items() if find_spec("torch") else ():
        words = ["benchmarks.on_gpu.pytorch", str(subject.checkpoint(engines)), "--mode", mode]
        words += ["--precision", subject.precision, "--steps", str(subject.steps)]
        words += ["--heads", str(subject.heads)] if subject.heads else []
        commands[name] = [*words, *(["--dry"] if dry else [])]
    workers, latents = (
        {},
        {name: work / f"latents-{images}-{name.replace(' ', '-')}.npy" for name in commands},
    )
    for name, words in commands.items():
        latents[name].unlink(missing_ok=True)
        command = [
            sys.executable,
            "-m",
            *words,
            "--noise",
            str(noise),
            "--latents",
            str(latents[name]),
        ]
        workers[name] = Worker(name, command, work / f"{images}-{name.replace(' ', '-')}.log")
    try:
        found = run_rounds(workers, deadline, 1 if dry else ROUNDS)
    finally:
        for worker in workers.values():
            worker.close()
    compare_results(found["contenders"], latents)
    return {"images": images, **found}


def _sides(subject: Subject) -> tuple[int, int]:
    return (8, 8) if subject.name == "golden" else (32, 32)


def run_rounds(workers: dict[str, Worker], deadline: Deadline, rounds: int) -> Found:
    """Wait for the workers, then let every contender run once per round, in turn.

    All workers start at the same time.
    """
    skipped: dict[str, str] = {}
    failed: dict[str, str] = {}
    about: dict[str, Found] = {}
    ready_by = Deadline(deadline.limit(deadline.left, FOR_ROUNDS))
    with ThreadPoolExecutor(max(len(workers), 1)) as pool:
        for name, result in zip(
            workers,
            pool.map(_caught(lambda w: w.answer(ready_by.left)), workers.values()),
            strict=True,
        ):
            if isinstance(result, str):
                failed[name] = result
            elif SKIPPED in result:
                skipped[name] = result[SKIPPED]
            else:
                about[name] = result
    for name in (*failed, *skipped):
        workers[name].close()
    turns = [(name, plan) for name, found in about.items() for plan in found["contenders"]]
    runs: dict[tuple[str, str], list[Found]] = {turn: [] for turn in turns}
    done = 0
    for number in range(rounds):
        for turn in turns[number % len(turns) :] + turns[: number % len(turns)] if turns else ():
            name, plan = turn
            if name in failed:
                continue
            result = _caught(lambda w, p=plan: w.run(p, deadline.left))(workers[name])
            if isinstance(result, str):
                failed[name] = result
            else:
                runs[turn].append(result)
        done += 1
        if deadline.left < 2:
            break
    contenders = {}
    for (name, plan), found in runs.items():
        if found:
            kept = {key: value for key, value in about[name].items() if key != "contenders"}
            contenders[f"{name} {plan}"] = {**summary(found), **kept}
    return {"rounds": done, "contenders": contenders, "skipped": skipped, "failed": failed}


def _caught(call: Callable[[Worker], Found]) -> Callable[[Worker], Found | str]:
    """The answer of a worker, or in words why there is none."""

    def run(worker: Worker) -> Found | str:
        started = time.monotonic()
        try:
            return call(worker)
        except RuntimeError as reason:
            return f"after {time.monotonic() - started:.0f} s: {reason}"

    return run


def compare_results(contenders: dict[str, Found], latents: dict[str, Path]) -> None:
    """How far the results without cache are from eager PyTorch's."""
    if not latents.get("pytorch", Path("/nowhere")).exists():
        return
    expected: Any = np.load(latents["pytorch"])
    for name, path in latents.items():
        entry = contenders.get(f"{name} none")
        if entry is not None and name != "pytorch" and path.exists():
            difference = np.linalg.norm(np.load(path) - expected) / np.linalg.norm(expected)
            entry["relative_l2"] = float(difference)
