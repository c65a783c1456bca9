"""Base policies: which unit is computed at which step. The others are reused plainly."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

from goc_deploy.errors import UsageError
from goc_deploy.policies.context import PolicyContext
from goc_deploy.policies.options import NoOptions, argument, option
from goc_deploy.schedule import COMPUTE, REUSE, Schedule


def compute_all(_options: NoOptions, context: PolicyContext) -> Schedule:
    """``none``: no caching."""
    return _same_for_all_units(context, [False] * context.steps)


@dataclass(frozen=True, slots=True)
class ForaOptions:
    """Options of `fora`. The fraction is exact: 0.55 of 20 steps is 11, not a little more."""

    interval: int = argument("Every INTERVAL-th step is computed.", low=1, high=1000)
    fraction: Fraction = argument(
        "Steps beyond the first FRACTION of all steps are computed too.",
        default=Fraction(1),
        separator="@",
        above=0,
        high=1,
    )
    phase: Literal["first", "last"] = option(
        "Count the steps from the first, or back from the last.", default="first"
    )


def fora(options: ForaOptions, context: PolicyContext) -> Schedule:
    """``fora``: every INTERVAL-th step is computed, and all beyond the first FRACTION of the steps.

    ``phase=first`` counts from step 0, as the GOC authors' schedules do; ``phase=last`` counts back
    from the last step, which is then computed, as FORA itself does (step 0 always is).

    Source: "FORA: Fast-Forward Caching in Diffusion Transformer Acceleration".
    """
    steps, interval = context.steps, options.interval
    counted = (
        range(0, steps, interval) if options.phase == "first" else range(steps - 1, -1, -interval)
    )
    computed = {0, *counted}
    return _same_for_all_units(
        context, [k not in computed and k < options.fraction * steps for k in range(steps)]
    )


@dataclass(frozen=True, slots=True)
class ComputedStepsOptions:
    """Options of `compute_steps`."""

    steps: tuple[int, ...] = argument("The steps that are computed.", form="K,K,..")


def compute_steps(options: ComputedStepsOptions, context: PolicyContext) -> Schedule:
    """``compute``: the named steps are computed.

    Raises:
        UsageError: step 0, which has nothing to reuse, is not among them; or one is beyond the last
            step.
    """
    last = context.steps - 1
    if 0 not in options.steps:
        raise UsageError("compute: step 0 has nothing to reuse; name it among the computed steps")
    if max(options.steps) > last:
        raise UsageError(f"compute: step {max(options.steps)} is beyond the last step {last}")
    return _same_for_all_units(context, [k not in options.steps for k in range(context.steps)])


@dataclass(frozen=True, slots=True)
class RouterOptions:
    """Options of `l2c`."""

    router: Path = argument("File of a Learning-to-Cache router.", form="ROUTER.pt")
    threshold: float = argument(
        "Units with a probability above it are computed.",
        default=0.1,
        separator="@",
        low=0,
        high=1,
    )


def l2c(options: RouterOptions, context: PolicyContext) -> Schedule:
    """``l2c``: a Learning-to-Cache router decides which units the odd steps reuse.

    Entry ``routers["i.prob"]`` of the file belongs to step T - 1 - i, and its numbers to attn and
    mlp of block 0, of block 1, ...; a unit is computed if sigmoid(number) > THRESHOLD.

    Source: "Learning-to-Cache: Accelerating Diffusion Transformer via Layer Caching", and its
    published routers.

    Raises:
        UsageError: the router is for another number of steps or units.
        ModelError, SafetyError: the file is not a router, or asks to run code.
    """
    path, spec = options.router, context.spec
    probabilities = context.router(str(path))
    if len(probabilities) != context.steps:
        raise UsageError(
            f"router {path} is for {len(probabilities)} steps but {context.steps} are asked for; "
            f"use `steps={len(probabilities)}`"
        )
    if any(len(row) != spec.units for row in probabilities):
        raise UsageError(
            f"router {path} is for {len(probabilities[0])} units but the model has {spec.units} "
            f"({spec.depth} blocks of {'+'.join(spec.branches)})"
        )
    rows = tuple(
        tuple(COMPUTE if step % 2 == 0 or p > options.threshold else REUSE for p in row)
        for step, row in enumerate(reversed(probabilities))
    )
    return Schedule.of(spec, rows)


@dataclass(frozen=True, slots=True)
class FileOptions:
    """Options of `from_file`."""

    schedule: Path = argument("Schedule file.", form="SCHEDULE.json")


def from_file(options: FileOptions, _context: PolicyContext) -> Schedule:
    """``file``: the schedule of a file."""
    return Schedule.load(options.schedule)


def _same_for_all_units(context: PolicyContext, reused: list[bool]) -> Schedule:
    spec = context.spec
    return Schedule.of(spec, tuple(((REUSE if r else COMPUTE),) * spec.units for r in reused))
