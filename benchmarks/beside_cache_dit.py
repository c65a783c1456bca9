"""goc_deploy beside cache-dit: the same weights, noise, guidance, threads and computed steps.

    python benchmarks/beside_cache_dit.py --model dit --steps 20 --images 4 --rounds 7
    python benchmarks/beside_cache_dit.py --model sd3 --steps 20 --images 1 --rounds 2

Needs the extra ``peers``. All contenders are in one process. Each is warmed up by a whole run. Then
every round runs every contender once, and each round starts with a different one; times are medians
over rounds. The error is the mean over images of the relative L2 distance of the final latents from
the contender's own run without cache. Errors of random weights tell nothing about trained models.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from benchmarks.peers.contenders import (
    CACHED,
    DIFFUSERS,
    OURS,
    PLANS,
    PeerContender,
    cache_dit_masked,
    diffusers_uncached,
    goc_deploy_plans,
    mask_of,
)
from benchmarks.peers.dit import digits_dit
from benchmarks.peers.model import PeerModel
from benchmarks.peers.pixart import digits_pixart
from benchmarks.peers.sd3 import random_sd3
from benchmarks.suite import machine_report
from benchmarks.work import Outcome
from goc_deploy.policies.grammar import parse_policy
from goc_deploy.policies.resolve import schedule_from_policy

MODELS: dict[str, Callable[[Path, int, int, Sequence[str]], PeerModel]] = {
    "dit": digits_dit,
    "pixart": digits_pixart,
    "sd3": random_sd3,
}
COLUMNS = (
    "contender",
    "blocks computed",
    "median s",
    "min-max",
    "own uncached / this",
    "diffusers uncached / this",
    "error",
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=tuple(MODELS), default="dit")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pixels", type=int, default=256, help="side of the images of sd3")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args(argv)
    torch.set_num_threads(os.cpu_count() or 1)  # as ONNX Runtime
    with tempfile.TemporaryDirectory(prefix="goc-peers-") as folder:
        make = MODELS[args.model]
        if args.model == "sd3":
            make = partial(random_sd3, pixels=args.pixels)
        model = make(Path(folder), args.images, args.steps, PLANS)
        found = measure(model, args.rounds)
    command = (
        f"python benchmarks/beside_cache_dit.py --model {args.model} --steps {args.steps} "
        f"--images {args.images} --rounds {args.rounds}"
        + (f" --pixels {args.pixels}" if args.model == "sd3" else "")
    )
    report = {"command": command, "what": model.what, **found}
    report |= {**machine_report(), "cache-dit": version("cache-dit")}
    if args.output:
        args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"{model.what}; {args.images} images, {args.steps} steps")
    print(f"goc_deploy without cache from diffusers: {found['distance']:.1e}\n")
    print(table_of(found["contenders"]))
    return 0


def contenders_of(model: PeerModel) -> list[PeerContender]:
    """All contenders, whose computed steps are those of `CACHED`."""
    schedule = schedule_from_policy(parse_policy(CACHED), model.spec, model.work.table.steps)
    mask = mask_of(schedule)
    masked = [cache_dit_masked(model, mask, taylor=taylor) for taylor in (False, True)]
    return [diffusers_uncached(model), *masked, *goc_deploy_plans(model)]


def measure(model: PeerModel, rounds: int) -> dict[str, Any]:
    """The rows of all contenders, and the distance between the two runs without cache."""
    entered = contenders_of(model)
    warm = {}
    for contender in entered:
        _print(f"warming up {contender.name}")
        warm[contender.name] = contender.run(model.work)
    computed = {contender.name: contender.computed() for contender in entered}
    total_ms: dict[str, list[float]] = {contender.name: [] for contender in entered}
    for number in range(rounds):
        turn = number % len(entered)
        for contender in entered[turn:] + entered[:turn]:
            _print(f"round {number + 1} of {rounds}: {contender.name}")
            total_ms[contender.name].append(contender.run(model.work).total_ms)
    rows = {
        contender.name: row_of(contender, computed[contender.name], total_ms, warm)
        for contender in entered
    }
    return {"distance": distance(warm[OURS], warm[DIFFUSERS]), "contenders": rows}


def row_of(
    contender: PeerContender,
    computed: float,
    total_ms: Mapping[str, list[float]],
    outcomes: Mapping[str, Outcome],
) -> dict[str, Any]:
    """What is known of a contender.

    Args:
        contender: the contender.
        computed: share of the blocks that it computes.
        total_ms: milliseconds of each round by contender.
        outcomes: final latents by contender.
    """
    name, own = contender.name, contender.uncached
    cached = name != own
    return {
        "computed": computed,
        "total_ms": total_ms[name],
        "own_ratio": median(total_ms[own]) / median(total_ms[name]),
        "diffusers_ratio": median(total_ms[DIFFUSERS]) / median(total_ms[name]),
        "error": distance(outcomes[name], outcomes[own]) if cached else None,
    }


def distance(found: Outcome, expected: Outcome) -> float:
    """Mean over images of the relative L2 distance of their final latents."""
    rows, expected_rows = (x.latents.reshape(len(x.latents), -1) for x in (found, expected))
    errors = np.linalg.norm(rows - expected_rows, axis=1) / np.linalg.norm(expected_rows, axis=1)
    return float(errors.mean())


def table_of(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The rows as a table of Markdown."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    for name, row in rows.items():
        seconds = [ms / 1e3 for ms in row["total_ms"]]
        error = "" if row["error"] is None else f"{row['error']:.4f}"
        cells = (
            f"`{name}`",
            f"{100 * row['computed']:.0f} %",
            f"{median(seconds):.3f}",
            f"{min(seconds):.3f}-{max(seconds):.3f}",
            f"{row['own_ratio']:.2f}",
            f"{row['diffusers_ratio']:.2f}",
            error,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _print(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
