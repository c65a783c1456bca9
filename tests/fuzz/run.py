"""Feed mutants of every kind of file to what reads it. Nothing but an error of ours may come out.

python -m tests.fuzz.run ENGINE_DIR --seconds 300 [--mutants 100000] [--processes 2] \\
    [--seed 0] [--kind manifest]...

A failure names the kind and the seed that make it again: --kind KIND --seed SEED --mutants 1.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from tests.fuzz.engine_kinds import EngineMutants, Trial
from tests.fuzz.family_kinds import family_trials
from tests.fuzz.input_kinds import input_trials
from tests.fuzz.workers import Tally, tried

RARITY = {  # kinds whose mutants take milliseconds are tried at one seed in so many
    "manifest": 12,
    "plan": 12,
    "schedule": 12,
    "graph": 12,
    "engine": 24,
    "npz": 1,
    "npy": 1,
    "safetensors": 1,
    "captions": 1,
    "checkpoint": 1,
    "legacy checkpoint": 1,
    "safetensors checkpoint": 1,
    "router": 1,
    "legacy router": 1,
    "model config": 2,
    "scheduler config": 4,
    "vae config": 1,
    "text encoder config": 1,
    "tokenizer": 1,
    "tokenizer of a folder": 1,
    "sentencepiece": 1,
    "head": 1,
    "plan with a head": 2,
    "schedule file": 1,
    "prompts": 1,
    "spec": 1,
    "sampler": 1,
    "family config": 2,
    "video vae config": 1,
    "clip config": 1,
    "clip tokenizer": 2,
    "smoothcache file": 1,
    "lora": 2,
    "prompt embeds": 1,
    "plan of two streams": 2,
    "plan of two sets": 2,
    "manifest of families": 2,
    "picture": 1,
    "shard job": 1,
}
REPORT_SECONDS = 30.0


def trials(engine: Path, folder: Path) -> dict[str, Trial]:
    """Kind of file -> a function that makes a mutant of it and uses it."""
    made = EngineMutants(engine, folder).trials()
    return {**made, **input_trials(folder), **family_trials(folder / "families")}


def main() -> int:
    """Try mutants until the time is over; 1 and the seeds of those that failed, else 0."""
    parser = argparse.ArgumentParser()
    parser.add_argument("engine", type=Path)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--mutants", type=float, default=math.inf)
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", action="append", choices=tuple(RARITY))
    options = parser.parse_args()
    rarity = dict.fromkeys(options.kind, 1) if options.kind else RARITY
    started = reported = time.monotonic()

    def report(tally: Tally) -> None:
        nonlocal reported
        if time.monotonic() - reported > REPORT_SECONDS:
            reported = time.monotonic()
            seconds = reported - started
            print(
                f"{tally.mutants} mutants, {len(tally.failures)} failures, {seconds:.0f} s",
                flush=True,
            )

    with tempfile.TemporaryDirectory() as folder:
        tally = tried(
            partial(trials, options.engine.absolute()),
            rarity,
            Path(folder),
            processes=options.processes,
            seed=options.seed,
            seconds=options.seconds,
            mutants=options.mutants,
            report=report,
        )
    for kind in rarity:
        accepted, refused = tally.accepted[kind], tally.refused[kind]
        print(f"{kind}: {accepted + refused} mutants, {refused} refused, {accepted} accepted")
    print("\n".join(tally.failures[:50]), file=sys.stderr)
    print(f"{tally.mutants} mutants, {len(tally.failures)} failures")
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main())
