"""The base policy ``search:BUDGET``: what `goc_deploy.policies.candidates` tries, measured on an engine."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import count

from goc_deploy.errors import ScheduleError, UsageError, VerificationError
from goc_deploy.metrics.paired import whole_relative_l2
from goc_deploy.policies.calibration import CalibrationOptions, Trials
from goc_deploy.policies.candidates import (
    MAX_STEPS,
    PREDICTORS,
    Candidate,
    exchange_units,
    plain,
    predicted,
    search,
    sizes_for,
)
from goc_deploy.policies.context import PolicyContext
from goc_deploy.policies.grammar import number, whole_number
from goc_deploy.schedule import COMPUTE, Schedule
from goc_deploy.spec import ModelSpec

REFERENCE_STEPS = 250
LEARNED = ("goc", "fit")  # corrections that need the schedule first
STAND_IN = "lagrange:2"
SHOWN = 10
PROBED = 8  # images that show what one unit matters
CLOCKED = (0, 3, 6, 9)  # computed steps, of 12, of the run that shows what a predicted step takes


def searched(argument: str, context: PolicyContext) -> Schedule:
    """``search:BUDGET``: the step count, computed steps and predictor with the least error to a converged solution.

    BUDGET is a number of computed steps, or with ``ms`` the milliseconds that one image may take on this machine. A
    correction in the SPEC is the only predictor tried; for ``goc`` and ``fit``, which learn on the schedule that comes
    out, ``lagrange:2`` stands in. ``steps=T`` fixes the step count; ``reference=STEPS`` is the length of the converged
    solution, every step computed. ``units`` exchanges computed units for predicted ones of the same branch afterwards,
    which takes one more trial per unit and step, on up to ``PROBED`` images each.

    Raises:
        UsageError: a budget that pays for nothing, or a sampler with fresh noise.
    """
    spec, options, correction = context.spec, context.options, context.correction
    reference_steps = whole_number(
        options.get("reference", str(REFERENCE_STEPS)), "reference", 2, 1000
    )
    fixed_steps = (
        whole_number(options["steps"], "steps", 1, MAX_STEPS) if "steps" in options else None
    )
    budget_ms = number(argument.removesuffix("ms"), "budget") if argument.endswith("ms") else None
    computed = whole_number(argument, "budget", 1, MAX_STEPS) if budget_ms is None else 0
    trials = context.engine().trials()
    if trials.table(reference_steps).stochastic:
        raise UsageError(
            f"sampler {trials.sampler!r} draws fresh noise, so there is no converged solution; use ddim or dpm++"
        )
    predictors = (
        PREDICTORS
        if correction is None
        else (STAND_IN if correction.partition(":")[0] in LEARNED else correction,)
    )
    sizes = sizes_for(
        (lambda _: computed) if budget_ms is None else _affordable(budget_ms, trials, spec),
        fixed_steps,
    )
    converged = uncached(spec, reference_steps)
    numbers = count(1)

    def judge(images: CalibrationOptions) -> Callable[[Schedule], float]:
        error_of = _error_to(converged, trials, images)

        def measure(schedule: Schedule) -> float:
            trials.progress(f"search, trial {next(numbers)}", 0, 1)
            try:
                return error_of(schedule)
            except (
                VerificationError,
                ScheduleError,
            ):  # it diverges, or the compiler sees that it would
                return math.inf

        return measure

    error_of = judge(trials.options)
    ranking = search(sizes, predictors, lambda candidate: error_of(candidate.schedule(spec)))
    error, best = ranking[0]
    if not math.isfinite(error):
        raise UsageError("every candidate diverges; raise the budget")
    mask = best.mask(spec)
    exchanged: dict[str, object] = {}
    if "units" in options:
        probe_of = judge(replace(trials.options, images=min(PROBED, trials.options.images)))
        exchanges, mask, unit_error = exchange_units(
            mask,
            len(spec.branches),
            lambda tried: probe_of(predicted(plain(tried, spec), best.predictor, spec)),
            lambda tried: error_of(predicted(plain(tried, spec), best.predictor, spec)),
        )
        exchanged = {"exchanges": exchanges, "error_after_exchanges": unit_error}
    found = predicted(plain(mask, spec), best.predictor, spec)
    held_out = replace(trials.options, seed=trials.options.seed + 1)
    held_out_error = _error_to(converged, trials, held_out)
    record = {
        "budget": argument,
        **_described(best),
        "reference_steps": reference_steps,
        "error": error,
        **exchanged,
        "held_out_seed": held_out.seed,
        "held_out_error": held_out_error(found),
        "held_out_error_of_as_many_uncached_steps": held_out_error(
            uncached(spec, len(best.computed))
        ),
        "trials": next(numbers) - 1,
        "best": [{"error": e, **_described(c)} for e, c in ranking[:SHOWN] if math.isfinite(e)],
        "calibration": trials.describe(),
    }
    return replace(
        found if correction is None else plain(mask, spec), provenance={"search": record}
    )


def uncached(spec: ModelSpec, steps: int) -> Schedule:
    """Every unit computed at every step."""
    return Schedule(spec.depth, spec.branches, ((COMPUTE,) * spec.units,) * steps)


def _described(candidate: Candidate) -> dict[str, object]:
    return {
        "steps": candidate.steps,
        "computed": list(candidate.computed),
        "predictor": candidate.predictor,
    }


def _error_to(
    converged: Schedule, trials: Trials, images: CalibrationOptions
) -> Callable[[Schedule], float]:
    trials.progress("search, the converged solution", 0, 1)
    expected = trials.run(converged, images).latents
    return lambda schedule: whole_relative_l2(trials.run(schedule, images).latents, expected)


def _affordable(budget_ms: float, trials: Trials, spec: ModelSpec) -> Callable[[int], int]:
    """Step count -> how many of the steps may be computed, by the measured times of one image."""
    one, steps = replace(trials.options, images=1), CLOCKED[-1] + CLOCKED[1]
    full_ms = trials.run(uncached(spec, steps), one).step_ms["full"]
    total_ms = trials.run(Candidate(steps, CLOCKED, STAND_IN).schedule(spec), one).total_ms
    predicted_ms = (total_ms - len(CLOCKED) * full_ms) / (steps - len(CLOCKED))
    predicted_ms = min(max(predicted_ms, 0.0), full_ms / 2)  # single runs are noisy
    return lambda steps: max(
        0, math.floor((budget_ms - steps * predicted_ms) / (full_ms - predicted_ms))
    )
