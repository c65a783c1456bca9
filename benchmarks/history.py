"""Print the memory of the history of a plan in every form, from the sizes of a model alone.

    python benchmarks/history.py
    python benchmarks/history.py --policy fora:4+lagrange:2

DiT and PixArt have one feature size. For models that cannot be exported yet, the sizes are those of
the features of the image tokens; `two per unit` counts all their features.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

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
        name: name and size of the images.
        depth: number of blocks, of the branches below.
        branches: units of a block.
        tokens: tokens of the image.
        hidden: width of a token.
        rows: rows per image, two with guidance.
        steps: a usual number of steps.
        feature_bytes: bytes of the features of all units in one row, if they differ in size.
    """

    name: str
    depth: int
    branches: tuple[str, ...]
    tokens: int
    hidden: int
    rows: int
    steps: int
    feature_bytes: float | None = None

    @property
    def units(self) -> int:
        """Number of units."""
        return self.depth * len(self.branches)

    @property
    def one(self) -> int:
        """Bytes of a feature in 16 bits, for all rows of an image."""
        return 2 * self.rows * self.tokens * self.hidden

    @property
    def two_per_unit(self) -> float:
        """Bytes of two features per unit."""
        if self.feature_bytes is None:
            return 2 * self.units * self.one
        return 2 * self.rows * self.feature_bytes


TWO, THREE = ("attn", "mlp"), ("attn", "cross", "mlp")
MODELS = (
    Model("DiT-XL/2 256^2", 28, TWO, 256, 1152, 2, 20),
    Model("PixArt-XL/2 512^2", 28, THREE, 1024, 1152, 2, 20),
    Model("FLUX.1 1024^2", 38, TWO, 4096, 3072, 1, 28, 2.15e9),
    Model("Qwen-Image 1328^2", 60, TWO, 6889, 3072, 2, 50, 5.1e9),
    Model("Wan 14B 1280x720, 81 frames", 40, THREE, 75600, 5120, 2, 50),
)


FORMS = (compile_for_host, compile_for_device, compile_to_sums)


def row(model: Model, policy: str) -> list[str]:
    """A row of the table: the number of buffers and their gigabytes in each form."""
    spec = ModelSpec(model.depth, 8, 2, 16, 2, 2, 4, 10, False, branches=model.branches)
    schedule = schedule_from_policy(parse_policy(policy), spec, model.steps)
    forms = [compile_form(schedule, spec) for compile_form in FORMS]
    cells = [
        f"{plan.cache_features}: {plan.cache_features * model.one / 1e9:.3f}" for plan in forms
    ]
    return [model.name, str(model.steps), policy, f"{model.two_per_unit / 1e9:.3f}", *cells]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policy", action="append", help=f"SPEC, repeatable; default {POLICIES}")
    policies = parser.parse_args(argv).policy or POLICIES
    print("one image, 16 bits; number of feature-sized buffers: their GB")
    columns = ["model", "steps", "SPEC", "two per unit, GB", "host", "device", "sums"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for model in MODELS:
        for policy in policies:
            print(f"| {' | '.join(row(model, policy))} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
