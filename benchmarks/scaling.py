"""How a full step, a step without computed units and the total grow.

They grow with depth, tokens, batch and steps.

    python benchmarks/scaling.py --output out/bench

Random weights of one width (by default that of DiT-S); each point is the median of a few
interleaved rounds.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

import goc_deploy
from benchmarks.make_checkpoint import random_state
from benchmarks.suite import machine_report
from goc_deploy.api import load_plans
from goc_deploy.spec import ModelSpec

AXES = {
    "depth": (4, 8, 12, 16, 24),
    "grid": (8, 12, 16, 24),
    "batch": (1, 2, 4, 8),
    "steps": (10, 20, 50),
}
PLANS = ("none", "fora:2+gc:1.2")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for axis, values in AXES.items():
        parser.add_argument(
            f"--{axis}", type=_numbers, default=values, help=f"comma-separated  [default: {values}]"
        )
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--base-depth", type=int, default=12, help="blocks where another axis varies"
    )
    parser.add_argument(
        "--base-grid", type=int, default=16, help="tokens per side where another axis varies"
    )
    parser.add_argument("--base-steps", type=int, default=8, help="steps where another axis varies")
    parser.add_argument("--output", type=Path, default=Path("out/bench"))
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    base = ModelSpec(
        args.base_depth, args.hidden, args.heads, 4 * args.hidden, 2, args.base_grid, 4, 1000, True
    )
    with tempfile.TemporaryDirectory(prefix="goc-scaling-") as folder:
        engine = Engines(Path(folder))
        curves = {
            "depth": [
                engine.point(replace(base, depth=n), 1, args.base_steps, args.rounds, n)
                for n in args.depth
            ],
            "tokens": [
                engine.point(replace(base, grid=n), 1, args.base_steps, args.rounds, n * n)
                for n in args.grid
            ],
            "batch": [engine.point(base, n, args.base_steps, args.rounds, n) for n in args.batch],
            "steps": [engine.point(base, 1, n, args.rounds, n) for n in args.steps],
        }
    found = {
        "command": "python benchmarks/scaling.py",
        "base": {
            "depth": base.depth,
            "hidden": base.hidden,
            "tokens": base.tokens,
            "steps": args.base_steps,
        },
        **machine_report(),
        "curves": {
            axis: {"points": points, "fits": fits(points)} for axis, points in curves.items()
        },
    }
    (args.output / "scaling.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


class Engines:
    """Exports each model once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def point(
        self, spec: ModelSpec, batch: int, steps: int, rounds: int, value: int
    ) -> dict[str, Any]:
        """Medians at one point of a curve."""
        engine = self._folder / f"{spec.depth}-{spec.grid}"
        if not engine.exists():
            checkpoint = engine.with_suffix(".pt")
            torch.save(random_state(spec, 0), checkpoint)
            goc_deploy.export(
                checkpoint, engine, plans=("none",), num_heads=spec.heads, max_batch=16
            )
        names = [
            goc_deploy.add_plan(
                engine, plan, name=f"{plan.replace(':', '-')}-{steps}", steps=steps
            ).name
            for plan in PLANS
        ]
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        pipes = load_plans(engine, names, batch_size=batch)
        for _ in range(rounds + 1):
            for name, pipe in zip(names, pipes, strict=True):
                runs[name].append(pipe.generate([0] * batch).report)
        print(
            f"depth {spec.depth}, {spec.tokens} tokens, {batch} images, {steps} steps",
            file=sys.stderr,
            flush=True,
        )
        totals = {
            f"total_ms {p}": median(r["total_ms"] for r in runs[n][1:])
            for p, n in zip(PLANS, names, strict=True)
        }
        return {
            "value": value,
            "full_step_ms": _step_ms(runs[names[0]][1:], "full"),
            "collapsed_step_ms": _step_ms(runs[names[1]][1:], "collapsed"),
            **totals,
        }


def _step_ms(reports: list[dict[str, Any]], kind: str) -> float:
    return median(s["ms"] for r in reports for s in r["batches"][0]["steps"] if s["kind"] == kind)


def fits(points: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Fits per measured quantity.

    They are the exponent of ``a * value ** exponent``, and ``intercept + slope * value``.
    """
    found = {}
    values = np.array([point["value"] for point in points], float)
    for key in points[0].keys() - {"value"}:
        ms = np.array([point[key] for point in points])
        slope, intercept = np.polyfit(values, ms, 1) if len(points) > 1 else (0.0, ms[0])
        exponent = np.polyfit(np.log(values), np.log(ms), 1)[0] if len(points) > 1 else 0.0
        found[key] = {
            "exponent": float(exponent),
            "intercept_ms": float(intercept),
            "slope_ms": float(slope),
        }
    return dict(sorted(found.items()))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


if __name__ == "__main__":
    raise SystemExit(main())
