"""Draw one picture that compares plans: the same images, the times, and the differences.

python examples/compare.py ENGINE --labels 0,1,2,3 --output comparison.png
python examples/compare.py ENGINE --prompt "a fox" --prompt "a pizza" --plan none --plan fora:2+goc
python examples/compare.py VIDEO_ENGINE --prompt "two drifts left" --output comparison.webp

The first plan is the reference of the speed-ups and of the differences. Times are medians of
several interleaved rounds after a warm-up, of all {what} in one batch.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import numpy.typing as npt
from comparison_picture import VIDEOS, Comparison, Row, save
from show import show_comparison

import goc_deploy

TITLES = {"none": "No cache", "fora:2": "Plain reuse", "fora:2+goc": "GOC"}
Images = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What every plan draws: class labels, or else prompts."""

    labels: list[int] | None
    prompts: list[str] | None
    seed: int
    cfg_scale: float

    @property
    def count(self) -> int:
        return len(self.labels or self.prompts or ())


def compare(engine: Path, plans: Sequence[str], wanted: Wanted, rounds: int) -> Comparison:
    """Run every plan once per round, in turn, so that drift of the machine hits all alike."""
    with ExitStack() as stack:
        pipes = [
            stack.enter_context(pipe)
            for pipe in goc_deploy.load_plans(engine, plans, batch_size=wanted.count)
        ]
        warmup = max(pipe.runs_to_warm for pipe in pipes)
        results = [
            [
                pipe.generate(
                    wanted.labels,
                    prompts=wanted.prompts,
                    seed=wanted.seed,
                    cfg_scale=wanted.cfg_scale,
                )
                for pipe in pipes
            ]
            for _ in range(warmup + rounds)
        ]
    seconds = [
        median(r.report["total_ms"] for r in of_plan) / 1000
        for of_plan in zip(*results[warmup:], strict=True)
    ]
    last = results[-1]
    reference, report = last[0].latents, last[0].report
    rows = [
        Row(
            title=TITLES.get(plan, plan),
            seconds=time,
            images=_images(result.images),
            error=float(np.linalg.norm(result.latents - reference) / np.linalg.norm(reference)),
        )
        for plan, time, result in zip(plans, seconds, last, strict=True)
    ]
    what = "videos" if rows[0].images.ndim == VIDEOS else "images"
    note = (
        f"{wanted.count} {what} in one batch, {report['steps']} steps, {report['backend']} "
        f"({report['provider'].removesuffix('ExecutionProvider')}), {report['precision']}, "
        f"median of {rounds} runs"
    )
    return Comparison(tuple(rows), tuple(wanted.prompts or ()), note)


def _images(images: Images | None) -> Images:
    if images is None:
        raise SystemExit("this engine directory makes latents; export it with --vae")
    return images


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engine", type=Path, help="engine directory")
    of = parser.add_mutually_exclusive_group(required=True)
    of.add_argument(
        "--labels",
        type=lambda text: [int(label) for label in text.split(",")],
        help="class labels separated by commas, one per image",
    )
    of.add_argument("--prompt", action="append", help="prompt of one image, repeatable")
    parser.add_argument(
        "--plan", action="append", help=f"repeatable (default: {', '.join(TITLES)})"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default %(default)s)")
    parser.add_argument(
        "--cfg-scale", type=float, default=4.0, help="guidance (default %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="measured runs (default %(default)s)")
    parser.add_argument(
        "--output", type=Path, default=Path("comparison.png"), help="(default %(default)s)"
    )
    args = parser.parse_args(argv)
    wanted = Wanted(args.labels, args.prompt, args.seed, args.cfg_scale)
    comparison = compare(args.engine, args.plan or list(TITLES), wanted, args.rounds)
    save(comparison, args.output)
    show_comparison(comparison.frames[-1])
    print(args.output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
