"""The base policy ``search:BUDGET``: see `goc_deploy.search`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from goc_deploy.bases import PolicyContext
from goc_deploy.errors import UsageError, VerificationError
from goc_deploy.grammar import number, whole_number
from goc_deploy.schedule import COMPUTE, Schedule
from goc_deploy.search import PREDICTORS, Candidate, search, sizes_for
from goc_deploy.spec import ModelSpec
from goc_deploy.trials import Trials, relative_l2

REFERENCE_STEPS = 250
LEARNED = ("goc", "fit")  # they need a schedule to learn on
STAND_IN = "lagrange:2"
SHOWN = 10
UNIT = 3  # steps of the run that measures a step's time: one full, then two predicted


def searched(argument: str, context: PolicyContext) -> Schedule:
    """``search:BUDGET[ms]``: step count, computed steps and predictor with the least error to a converged solution.

    BUDGET is the number of computed steps (full-step equivalents), or with ``ms`` the milliseconds that one image may
    take on this machine. A correction that the SPEC names is the only predictor tried; for ``goc`` and ``fit``, which
    learn on the schedule that comes out, ``lagrange:2`` stands in. ``reference=STEPS`` is the number of computed steps
    of the converged solution.

    Raises:
        UsageError: a budget that pays for nothing, or a sampler with fresh noise.
    """
    trials, calibration = context.trials(), context.calibration
    steps_of_reference = whole_number(context.options.get("reference", str(REFERENCE_STEPS)), "reference", 2, 1000)
    if context.table.stochastic:
        raise UsageError("a search needs a sampler without fresh noise, which has no converged solution; use ddim")
    spec, sampler = context.spec, context.table.sampler
    count_at = _count_at(argument, trials, context)
    held_out = replace(calibration, seed=calibration.seed + 1)
    uncached = _uncached(spec, steps_of_reference)
    context.progress("search: the converged reference", 0, 1)
    expected = trials.run(uncached, sampler, calibration).latents
    fixed_predictor = context.correction if context.correction and not context.correction.startswith(LEARNED) else None
    predictors = PREDICTORS if context.correction is None else (fixed_predictor or STAND_IN,)
    sizes = sizes_for(count_at, context.steps_asked)
    tried = 0

    def measure(candidate: Candidate) -> float:
        nonlocal tried
        tried += 1
        context.progress(f"search: trial {tried}", tried, 0)
        try:
            return relative_l2(trials.run(candidate.schedule(spec), sampler, calibration).latents, expected)
        except VerificationError:
            return math.inf

    ranking = search(sizes, predictors, measure)
    error, best = ranking[0]
    if not math.isfinite(error):
        raise UsageError("every candidate diverges; raise the budget")
    expected = trials.run(uncached, sampler, held_out).latents

    def held_out_error(schedule: Schedule) -> float:
        return relative_l2(trials.run(schedule, sampler, held_out).latents, expected)

    record = {
        "budget": argument,
        "steps": best.steps,
        "computed": list(best.computed),
        "predictor": best.predictor,
        "reference_steps": steps_of_reference,
        "error": error,
        "held_out_error": held_out_error(best.schedule(spec)),
        "held_out_error_of_as_many_uncached_steps": held_out_error(_uncached(spec, len(best.computed))),
        "trials": len(ranking),
        "best": [
            {"error": e, "steps": c.steps, "computed": list(c.computed), "predictor": c.predictor}
            for e, c in ranking[:SHOWN]
            if math.isfinite(e)
        ],
        "calibration": context.describe_calibration(),
    }
    schedule = best.schedule(spec) if context.correction is None else best.plain(spec)
    return replace(schedule, provenance={"search": record})


def _uncached(spec: ModelSpec, steps: int) -> Schedule:
    return Schedule(spec.depth, spec.branches, ((COMPUTE,) * spec.units,) * steps)


def _count_at(argument: str, trials: Trials, context: PolicyContext) -> Callable[[int], int]:
    """Step count -> how many of the steps the budget lets compute."""
    if not argument.endswith("ms"):
        count = whole_number(argument, "budget", 1, 1000)
        return lambda _: count
    budget_ms = number(argument.removesuffix("ms"), "budget") if argument != "ms" else 0.0
    if not budget_ms > 0:
        raise UsageError(f"budget {argument} must be above 0")
    full_ms, cached_ms = _step_ms(trials, context)
    return lambda steps: max(0, math.floor((budget_ms - steps * cached_ms) / (full_ms - cached_ms)))


def _step_ms(trials: Trials, context: PolicyContext) -> tuple[float, float]:
    """Milliseconds of a full step and of what a predicted step adds, for one image."""
    spec, one = context.spec, replace(context.calibration, images=1)
    predicted = Candidate(4 * UNIT, tuple(range(0, 4 * UNIT, UNIT)), STAND_IN).schedule(spec)
    full_ms = trials.run(_uncached(spec, 4 * UNIT), context.table.sampler, one).step_ms["full"]
    total_ms = trials.run(predicted, context.table.sampler, one).total_ms
    cached_ms = max(0.0, (total_ms - 4 * full_ms) / (4 * (UNIT - 1)))
    return full_ms, min(cached_ms, 0.5 * full_ms)
