"""What a plan must compute and move on a GPU at least, and the time at datasheet peaks.

The work is counted from the plan's launches.

    python benchmarks/roofline.py --model XL/2 --precision fp16 --images 1 --images 8
    python benchmarks/roofline.py --measured docs/gpu/CARD-DATE.json    # from benchmarks/gpu.py

Predictions, not measurements: a launch takes as long as its operations or its bytes take at the
peak, whichever is longer. Every tensor between two matrix products passes the memory once in each
direction, except within attention. Launches themselves, caches, and what a kernel reaches of a peak
are not in it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.make_checkpoint import spec_of
from goc_deploy.compiler import Compute, Plan, Predict, compile_for_device
from goc_deploy.policies.grammar import parse_policy
from goc_deploy.policies.resolve import schedule_from_policy
from goc_deploy.precision import ITEM_BYTES, PRECISIONS
from goc_deploy.schedule.operations import product_flops
from goc_deploy.spec import ModelSpec

PLANS = ("none", "fora:2", "fora:2+gc:1.2")


@dataclass(frozen=True, slots=True)
class Gpu:
    """Peaks of a datasheet: dense tensor-core operations and memory.

    The operations have 16-bit inputs and float32 sums.
    """

    name: str
    teraflops: float
    gigabytes_per_second: float


# NVIDIA's datasheets of A40, L40S and H100 (SXM), and its whitepapers on the Ada and Blackwell
# GeForce GPUs.
GPUS = (
    Gpu("A40", 149.7, 696),
    Gpu("L40S", 362.05, 864),
    Gpu("H100 SXM", 989.4, 3350),
    Gpu("RTX 4090", 165.2, 1008),
    Gpu("RTX 5090", 209.5, 1792),
)


@dataclass(frozen=True, slots=True)
class Work:
    """Floating point operations of matrix products, and bytes."""

    flops: float
    nbytes: float

    def seconds(self, gpu: Gpu) -> float:
        """At the peaks."""
        return max(
            self.flops / (gpu.teraflops * 1e12), self.nbytes / (gpu.gigabytes_per_second * 1e9)
        )


@dataclass(frozen=True, slots=True)
class Counter:
    """Counts the work of launches.

    Attributes:
        spec: the model.
        rows: of the batch, two per image with guidance.
        item: bytes of a value.
    """

    spec: ModelSpec
    rows: int
    item: int

    @property
    def feature(self) -> int:
        """Bytes of a tensor (B, T, D)."""
        return self.rows * self.spec.tokens * self.spec.hidden * self.item

    def compute(self, op: Compute) -> list[Work]:
        """A unit: each matrix product, then the gated sum.

        Reads and writes are counted in features.
        """
        spec, d = self.spec, self.spec.hidden
        unit, wide = spec.declared_units[op.unit], spec.mlp_hidden / spec.hidden
        captions = 2 * spec.caption_tokens / spec.tokens  # keys and values
        layers, moved = {
            "attn": ((3 * d * d, 0, d * d), (1 + 3, 3 + 1, 1 + 1)),
            "cross": ((d * d, 0, d * d), (1 + 1, 1 + captions + 1, 1 + 1)),
            "mlp": ((d * spec.mlp_hidden, spec.mlp_hidden * d), (1 + wide, wide + 1)),
        }[unit.branch]
        modulated = Work(0, 2 * self.feature)
        added = Work(0, 3 * self.feature)
        products = [
            Work(self.rows * flops, weights * self.item + features * self.feature)
            for flops, weights, features in zip(
                product_flops(spec, unit), layers, moved, strict=True
            )
        ]
        return [modulated, *products, added]

    def predict(self, op: Predict) -> list[Work]:
        """One pass over x, the history and what is stored, and the gates."""
        features = 2 + sum(len(p.slots) + (p.store is not None) for p in op.predictions)
        gates = len(op.predictions) * self.rows * self.spec.hidden * self.item
        flops = 2 * features * self.feature / self.item
        return [Work(flops, features * self.feature + gates)]

    def around(self, rows_used: int) -> list[Work]:
        """Modulation rows, embedding, final layer and sampler: the graphs that every step runs."""
        spec = self.spec
        pixels = spec.side**2 * 4
        latents, prediction = (
            self.rows * spec.channels * pixels,
            self.rows * spec.output_channels * pixels,
        )
        return [
            Work(0, 2 * rows_used * self.rows * spec.hidden * self.item),
            self._patch(spec.channels, latents),
            self._patch(spec.output_channels, prediction),
            Work(0, prediction + 2 * latents),
        ]

    def _patch(self, channels: int, pixels: int) -> Work:
        weights, tokens = (
            self.spec.patch**2 * channels * self.spec.hidden,
            self.rows * self.spec.tokens,
        )
        return Work(2 * tokens * weights, weights * self.item + self.feature + pixels)

    def conditioning(self, steps: int, labels: int) -> list[Work]:
        """The modulation table, once per batch."""
        rows, d = steps * labels, self.spec.hidden
        outputs = self.spec.modulation.count * d
        return [Work(2 * rows * d * outputs, (outputs * d + rows * outputs) * self.item)]


def steps_of(plan: Plan, counter: Counter) -> Iterator[list[Work]]:
    """The work of each step of a plan in the device's form."""
    rows = counter.spec.modulation
    for launches in plan.launches:
        computes = any(isinstance(op, Compute) for op in launches)
        works = counter.around(len(rows.read(computes=computes, predicts=True)))
        for op in launches:
            works += counter.compute(op) if isinstance(op, Compute) else counter.predict(op)  # type: ignore[arg-type]
        yield works


def total(works: Sequence[Work]) -> Work:
    """Their sum."""
    return Work(sum(work.flops for work in works), sum(work.nbytes for work in works))


def predicted(
    name: str, counter: Counter, steps: int, images: int, gpu: Gpu
) -> tuple[Work, float, float]:
    """The work of a plan's full (``none``) or collapsed step on a GPU, and seconds.

    The seconds are those of the step and those of the plan.
    """
    plan = compile_for_device(
        schedule_from_policy(parse_policy(name), counter.spec, steps), counter.spec, "ddim"
    )
    every = list(steps_of(plan, counter))
    works = every[2 if name == "none" else 5]
    before = counter.conditioning(steps, images + 1)
    seconds = sum(work.seconds(gpu) for step in [before, *every] for work in step)
    return total(works), sum(work.seconds(gpu) for work in works), seconds


def tables(model: str, precision: str, images: int, steps: int) -> str:
    """Markdown: the work and the bytes of a step of each kind, and the predictions per GPU."""
    spec = spec_of(model, 256)
    counter = Counter(spec, 2 * images, ITEM_BYTES[precision])
    lines = [
        (
            f"DiT-{model} 256, {precision}, {images} image{'s' if images > 1 else ''} with "
            f"guidance, {steps} steps:"
        ),
        "",
        "| step | GFLOP | MB |" + "".join(f" {gpu.name} |" for gpu in GPUS),
        "|---" * (3 + len(GPUS)) + "|",
    ]
    seconds: dict[str, list[float]] = {}
    for name in PLANS:
        found = [predicted(name, counter, steps, images, gpu) for gpu in GPUS]
        work, what = found[0][0], "full" if name == "none" else f"collapsed, `{name}`"
        lines.append(
            f"| {what} | {work.flops / 1e9:.1f} | {work.nbytes / 1e6:.0f} |"
            + "".join(f" {1e3 * step:.2f} ms |" for _, step, _ in found)
        )
        seconds[name] = [whole for _, _, whole in found]
    for name in PLANS[1:]:
        ratios = [none / own for none, own in zip(seconds["none"], seconds[name], strict=True)]
        lines.append(
            f"| speed-up of `{name}` | | |" + "".join(f" {ratio:.2f} |" for ratio in ratios)
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", default="XL/2", help="S/2, B/2, L/2, XL/2, or another patch size"
    )
    parser.add_argument("--precision", choices=PRECISIONS[1:], default="fp16")
    parser.add_argument(
        "--images", type=int, action="append", help="repeatable  [default: 1 and 8]"
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument(
        "--measured",
        type=Path,
        help="JSON file of benchmarks/gpu.py; model and sizes are taken from it",
    )
    args = parser.parse_args(argv)
    if args.measured:
        from benchmarks.on_gpu.comparison import compared
        from benchmarks.on_gpu.results import read

        print(compared(read(args.measured)))
        return 0
    print(
        "\n\n".join(
            tables(args.model, args.precision, images, args.steps)
            for images in args.images or (1, 8)
        )
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
