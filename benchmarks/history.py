"""Print the memory of the history of a plan in every form, from the sizes of a model alone.

    python benchmarks/history.py
    python benchmarks/history.py --policy fora:4+lagrange:2

The sizes are those of the public models. `two per feature` is two entries of every feature, with
those of the text. No plan of the table keeps features of the text.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.make_checkpoint import spec_of
from goc_deploy.compiler import compile_for_device, compile_for_host, compile_to_sums
from goc_deploy.policies.grammar import parse_policy
from goc_deploy.policies.resolve import schedule_from_policy
from goc_deploy.spec import ModelSpec

POLICIES = (
    "fora:2",
    "fora:2+gc:0.5",
    "fora:2+gc:0.5,history=computed",
    "fora:3+gc:0.5,history=computed",
    "fora:3+lagrange:2",
)


@dataclass(frozen=True, slots=True)
class Model:
    """What the memory of a history depends on.

    Attributes:
        title: name and size of the images, for people.
        name: name of its sizes in `benchmarks.make_checkpoint.spec_of`.
        grid: tokens along each axis of a sample.
        rows: rows per image, two with guidance.
        steps: a usual number of steps.
    """

    title: str
    name: str
    grid: tuple[int, ...]
    rows: int
    steps: int

    @property
    def spec(self) -> ModelSpec:
        """The model, for samples of this size."""
        return spec_of(self.name, 256).at(self.grid)


MODELS = (
    Model("DiT-XL/2 256^2", "XL/2", (16, 16), 2, 20),
    Model("PixArt-XL/2 512^2", "PixArt-XL/2", (32, 32), 2, 20),
    Model("SD3.5-Medium 1024^2", "SD3.5-Medium", (64, 64), 2, 28),
    Model("FLUX.1-dev 1024^2", "FLUX.1-dev", (64, 64), 1, 28),
    Model("Qwen-Image 1328^2", "Qwen-Image", (83, 83), 2, 50),
    Model("Wan 14B 1280x720, 81 frames", "Wan-14B", (21, 45, 80), 2, 50),
)


FORMS = (compile_for_host, compile_for_device, compile_to_sums)


def row(model: Model, policy: str) -> list[str]:
    """A row of the table: the number of buffers and their gigabytes in each form."""
    spec = model.spec
    schedule = schedule_from_policy(parse_policy(policy), spec, model.steps)
    sampler = "euler" if "flow" in spec.prediction_type else "ddim"
    plans = [compile_form(schedule, spec, sampler) for compile_form in FORMS]
    assert not any(plan.features_of("text") for plan in plans)
    cells = [
        f"{plan.cache_features}: {plan.cache_bytes(spec, model.rows, 2) / 1e9:.3f}"
        for plan in plans
    ]
    naive = plans[0].naive_cache_bytes(spec, model.rows, 2)
    return [model.title, str(model.steps), policy, f"{naive / 1e9:.3f}", *cells]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policy", action="append", help=f"SPEC, repeatable; default {POLICIES}")
    policies = parser.parse_args(argv).policy or POLICIES
    print("one image, 16 bits; number of feature-sized buffers: their GB")
    columns = ["model", "steps", "SPEC", "two per feature, GB", "host", "device", "sums"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for model in MODELS:
        for policy in policies:
            print(f"| {' | '.join(row(model, policy))} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
