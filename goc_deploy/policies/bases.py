"""Base policies: which unit is computed at which step. What is not computed is reused plainly; corrections refine it."""

from __future__ import annotations

from fractions import Fraction

from goc_deploy.errors import UsageError
from goc_deploy.policies.context import PolicyContext
from goc_deploy.policies.grammar import number, split_threshold, whole_number
from goc_deploy.schedule import COMPUTE, REUSE, Schedule

L2C_THRESHOLD = "0.1"


def compute_all(argument: str, context: PolicyContext) -> Schedule:
    """``none``: no caching."""
    if argument:
        raise UsageError("'none' takes no argument")
    return _same_for_all_units(context, [False] * context.steps)


def fora(argument: str, context: PolicyContext) -> Schedule:
    """``fora:INTERVAL[@FRACTION]``: every INTERVAL-th step is computed, and all beyond the first FRACTION of the steps.

    ``phase=first`` counts from step 0, as the GOC authors' schedules do; ``phase=last`` counts back from the last step,
    which is then computed, as FORA itself does (step 0 always is).

    Source: "FORA: Fast-Forward Caching in Diffusion Transformer Acceleration".
    """
    interval_text, at, fraction_text = argument.partition("@")
    interval = whole_number(interval_text, "interval", 1, 1000)
    if at and not 0 < number(fraction_text, "fraction") <= 1:
        raise UsageError(f"fraction {fraction_text} must be above 0 and at most 1")
    fraction = (
        Fraction(fraction_text) if at else Fraction(1)
    )  # exact: 0.55 of 20 steps is 11, not a little more
    phase, steps = context.options.get("phase", "first"), context.steps
    if phase not in ("first", "last"):
        raise UsageError(f"phase {phase!r} must be first or last")
    computed = set(
        range(0, steps, interval) if phase == "first" else range(steps - 1, -1, -interval)
    ) | {0}
    return _same_for_all_units(
        context, [k not in computed and k < fraction * steps for k in range(steps)]
    )


def l2c(argument: str, context: PolicyContext) -> Schedule:
    """``l2c:ROUTER.pt[@THRESHOLD]``: a Learning-to-Cache router says which units the odd steps reuse.

    Entry ``routers["i.prob"]`` of the file belongs to step T - 1 - i, and its numbers to attn and mlp of block 0, of
    block 1, ...; a unit is computed where sigmoid(number) > THRESHOLD.

    Source: "Learning-to-Cache: Accelerating Diffusion Transformer via Layer Caching", and its published routers.

    Raises:
        UsageError: the router is for another number of steps or units, or the threshold is out of range.
        ModelError, SafetyError: the file is not a router, or asks to run code.
    """
    path, threshold_text = split_threshold(argument)
    if not path:
        raise UsageError("'l2c:' needs the path of a router file")
    threshold = number(threshold_text or L2C_THRESHOLD, "threshold")
    if not 0 <= threshold <= 1:
        raise UsageError(f"threshold {threshold_text} must be within 0..1")
    probabilities, spec = context.router(path), context.spec
    if len(probabilities) != context.steps:
        raise UsageError(
            f"router {path} is for {len(probabilities)} steps but {context.steps} are asked for; use `steps={len(probabilities)}`"
        )
    if any(len(row) != spec.units for row in probabilities):
        raise UsageError(
            f"router {path} is for {len(probabilities[0])} units but the model has {spec.units} ({spec.depth} blocks of {'+'.join(spec.branches)})"
        )
    rows = tuple(
        tuple(COMPUTE if step % 2 == 0 or p > threshold else REUSE for p in row)
        for step, row in enumerate(reversed(probabilities))
    )
    return Schedule(spec.depth, spec.branches, rows)


def from_file(argument: str, _context: PolicyContext) -> Schedule:
    """``file:SCHEDULE.json``."""
    if not argument:
        raise UsageError("'file:' needs a path")
    return Schedule.load(argument)


def _same_for_all_units(context: PolicyContext, reused: list[bool]) -> Schedule:
    spec = context.spec
    return Schedule(
        spec.depth, spec.branches, tuple(((REUSE if r else COMPUTE),) * spec.units for r in reused)
    )
