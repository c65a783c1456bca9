"""How near plans stay to no cache with prompts or weights that their heads have not seen.

    python benchmarks/head_transfer.py engine fora-2 hidden \\
        --prompts seen.txt --prompts unseen.txt --cfg-scale 2
    python benchmarks/head_transfer.py engine fora-2 hidden --weights other --cfg-scale 4

Printed is the mean relative L2 distance per image of the latents to those without cache, and half
of a 95 % interval.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from goc_deploy.api import load
from goc_deploy.evaluation.tables import METRICS, shown_value
from goc_deploy.metrics.estimate import mean_estimate
from goc_deploy.metrics.paired import relative_l2

UNCACHED = "none"
RELATIVE_L2 = next(metric for metric in METRICS if metric.key == "relative_l2")

Case = tuple[str, list[str] | None, Path | None]


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    print("| images | plan | relative L2 |\n|---|---|---|")
    for title, prompts, weights in cases(args):
        expected = _latents(args, UNCACHED, prompts, weights)
        for plan in args.plans:
            found = _latents(args, plan, prompts, weights)
            print(f"| {title} | {plan} | {_distance(found, expected)} |", flush=True)
    return 0


def parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engine", type=Path, help="engine directory with a plan none")
    parser.add_argument("plans", nargs="+", help="plans to measure")
    unseen = parser.add_mutually_exclusive_group()
    unseen.add_argument("--prompts", type=Path, action="append", help="a prompt per line")
    unseen.add_argument("--weights", type=Path, help="engine directory whose weights to use too")
    parser.add_argument("--images", type=int, default=256, help="number of images without prompts")
    parser.add_argument("--cfg-scale", type=float, required=True)
    parser.add_argument("--seed", type=int, default=5)
    return parser


def cases(args: argparse.Namespace) -> list[Case]:
    """(title, prompts, weights) of each set of images."""
    if args.prompts:
        texts = [(path, path.read_text(encoding="utf-8").splitlines()) for path in args.prompts]
        return [(f"{path.stem} ({len(lines)})", lines, None) for path, lines in texts]
    own: Case = (f"own weights ({args.images})", None, None)
    if not args.weights:
        return [own]
    return [own, (f"weights of {args.weights} ({args.images})", None, args.weights)]


def _latents(
    args: argparse.Namespace, plan: str, prompts: list[str] | None, weights: Path | None
) -> np.ndarray:
    with load(args.engine, plan=plan) as pipeline:
        if weights:
            pipeline.load_weights(weights)
        labels = None if prompts else [i % pipeline.spec.choices for i in range(args.images)]
        result = pipeline.generate(
            labels, prompts=prompts, seed=args.seed, cfg_scale=args.cfg_scale, decode=False
        )
    return result.latents


def _distance(found: np.ndarray, expected: np.ndarray) -> str:
    mean = mean_estimate(relative_l2(found, expected), seed=0)
    return shown_value(asdict(mean), RELATIVE_L2, "±")


if __name__ == "__main__":
    sys.exit(main())
