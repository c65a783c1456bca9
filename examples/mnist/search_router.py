"""Search a Learning-to-Cache router for this example.

It decides which units the odd steps can reuse with the least harm.

    python examples/mnist/search_router.py engine examples/mnist/router20.pt

Every unit of every odd step is reused alone; what that does to the final latents, relative to no
cache, is what it matters. The file has the layout of the published routers: logits above that of
the threshold 0.1 are computed. They grow with the error, so another threshold in the SPEC reuses
more or less.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from goc_deploy.api import cpu_backend
from goc_deploy.api.laboratory import EngineTrials
from goc_deploy.disk import written
from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.metrics.paired import whole_relative_l2
from goc_deploy.options import no_progress
from goc_deploy.policies.calibration import CalibrationOptions
from goc_deploy.policies.candidates import plain, uncached

THRESHOLD = 0.1


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engine", type=Path)
    parser.add_argument("output", type=Path, help="router .pt to write")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument(
        "--share", type=float, default=0.25, help="of all units to reuse at threshold 0.1"
    )
    parser.add_argument("--images", type=int, default=16)
    args = parser.parse_args(argv)
    directory = EngineDir.open(args.engine)
    spec = directory.manifest.model
    options = CalibrationOptions(args.images)
    trials = EngineTrials(directory, cpu_backend(), "ddim", options, no_progress)
    expected = trials.run(uncached(spec, args.steps), options).latents
    cells = [(step, unit) for step in range(1, args.steps, 2) for unit in range(spec.units)]
    losses = errors_of_reuse(
        np.ones((args.steps, spec.units), bool),
        cells,
        lambda mask: whole_relative_l2(trials.run(plain(mask, spec), options).latents, expected),
    )
    logits = router_logits(
        losses, args.steps, spec.units, round(args.share * args.steps * spec.units)
    )
    with written(args.output) as temporary:
        torch.save({"routers": {f"{i}.prob": row for i, row in enumerate(logits)}}, temporary)
    print(args.output)
    return 0


def errors_of_reuse(
    mask: np.ndarray, cells: Iterable[tuple[int, int]], measure: Callable[[np.ndarray], float]
) -> dict[tuple[int, int], float]:
    """Cell (step, unit) of ``mask``, which computes units -> error if it alone is reused."""
    errors = {}
    for cell in cells:
        other = mask.copy()
        other[cell] = False
        errors[cell] = measure(other)
    return errors


def router_logits(
    losses: dict[tuple[int, int], float], steps: int, units: int, reused: int
) -> torch.Tensor:
    """(steps, units) float32, the last step first.

    The ``reused`` cells with the least loss are at or below THRESHOLD.

    Cells without a loss, those of even steps, are far above it.
    """
    cutoff = sorted(losses.values())[reused - 1] if reused else 0.0
    at_threshold = math.log(THRESHOLD / (1 - THRESHOLD))
    logits = torch.full((steps, units), 10.0)
    for (step, unit), loss in losses.items():
        above = math.log(max(loss, 1e-30) / cutoff) if cutoff else 1.0
        logits[steps - 1 - step, unit] = at_threshold + (above if above > 0 else above - 1e-4)
    return logits


if __name__ == "__main__":
    raise SystemExit(main())
