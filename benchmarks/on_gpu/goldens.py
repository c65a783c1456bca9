"""Golden trajectories on a backend, launched and replayed.

The result is the worst step against the reference, by precision and plan.

python -m benchmarks.on_gpu.goldens goldens.json --backend onnxruntime-cuda \\
    --engine fp32=ENGINE --engine fp16=ENGINE
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

import goc_deploy
from benchmarks.on_gpu.device import saver
from benchmarks.on_gpu.jobs import ROOT
from goc_deploy.errors import EnvironmentUnsupportedError

CHECKPOINT = ROOT / "tests" / "golden" / "model.pt"
TRAJECTORIES = ROOT / "tests" / "golden" / "golden.npz"
HEADS = 4
PLANS = {"none": "no_cache", "fora:2": "fora_50", "fora:2+gc:1.2": "fora_50_gc"}
# fp32: docs and CONTRIBUTING promise it. The others: the reference is fp32, and these bound what
# their rounding may add.
MOST = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1}
RUNS = 3  # launched one by one, then recorded, then replayed


def worst_step(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest relative L2 over steps; NaN if one is not finite."""
    return float(
        np.max(
            [
                np.linalg.norm(f - e) / np.linalg.norm(e)
                for f, e in zip(found, expected, strict=True)
            ]
        )
    )


def measured(
    engine: Path, precision: str, backend: str, plan: str, *, graphs: bool
) -> dict[str, Any]:
    """One plan: the worst step over all runs, or why it does not run here."""
    entry: dict[str, Any] = {
        "backend": backend,
        "precision": precision,
        "plan": plan,
        "most": MOST[precision],
    }
    with np.load(TRAJECTORIES) as golden:
        expected, noise, labels = golden[PLANS[plan]], golden["noise"], golden["labels"]
    try:
        with goc_deploy.load(engine, plan=plan, backend=backend, cuda_graphs=graphs) as pipe:
            runs = [
                pipe.generate(labels, latents=noise, cfg_scale=2.0, trajectory=True)
                for _ in range(RUNS)
            ]
    except EnvironmentUnsupportedError as reason:
        return {**entry, "worst_step": None, "not_here": str(reason)[:400]}
    except Exception as error:  # one plan that fails must not hide what the others do
        return {**entry, "worst_step": None, "failed": f"{type(error).__name__}: {error}"[:400]}
    trajectories = [run.trajectory for run in runs]
    equal = all(np.array_equal(t, trajectories[0]) for t in trajectories)
    return {
        **entry,
        "worst_step": worst_step(np.concatenate(trajectories), np.concatenate([expected] * RUNS)),
        "runs_equal": equal,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--backend", required=True)
    parser.add_argument(
        "--engine", action="append", required=True, help="PRECISION=ENGINE; repeatable"
    )
    parser.add_argument("--no-cuda-graphs", action="store_true")
    args = parser.parse_args()
    save, found = saver(args.output), []
    for precision, _, engine in (text.partition("=") for text in args.engine):
        for plan in PLANS:
            found.append(
                measured(
                    Path(engine), precision, args.backend, plan, graphs=not args.no_cuda_graphs
                )
            )
            save(found)
            if "not_here" in found[-1]:
                break


if __name__ == "__main__":
    main()
