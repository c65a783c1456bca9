"""The base policy ``search``: `goc_deploy.policies.candidates`, measured on an engine."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from goc_deploy.errors import ScheduleError, UsageError, VerificationError
from goc_deploy.policies.calibration import CalibrationOptions, Trials
from goc_deploy.policies.candidates import MAX_SEARCHED_STEPS, Candidate, search, sizes_for
from goc_deploy.policies.context import PolicyContext
from goc_deploy.policies.options import Milliseconds, argument, option
from goc_deploy.schedule import COMPUTE, Schedule
from goc_deploy.spec import ModelSpec

CORRECTIONS_TRIED = ("gc:1.0", "taylor:2", "lagrange:1", "lagrange:2", "lagrange:3", "hermite:2")
STAND_IN = "lagrange:2"  # for corrections that calibrate, which need the schedule first
SHOWN = 10
CLOCKED = (0, 3, 6, 9)  # computed steps, of 12, of the run that shows what a predicted step takes


@dataclass(frozen=True, slots=True)
class SearchOptions:
    """Options of `searched`."""

    budget: int | Milliseconds = argument(
        "Steps to compute, or with ms the time that one image may take on this machine.",
        form="BUDGET[ms]",
        low=1,
        high=MAX_SEARCHED_STEPS,
    )
    steps: int | None = option(
        "The step count. Without it, several are tried.",
        default=None,
        low=1,
        high=MAX_SEARCHED_STEPS,
    )
    reference: int = option(
        "Steps of the converged solution, all computed.", default=250, low=2, high=1000
    )


class Judge:
    """Measures how far a schedule's images are from the converged solution.

    Args:
        trials: runs schedules.
        converged: the schedule of the converged solution, which runs at once.
        images: the calibration images.

    Attributes:
        trials: schedules measured by `error` so far.
    """

    def __init__(self, trials: Trials, converged: Schedule, images: CalibrationOptions) -> None:
        trials.progress("search, the converged solution", 0, 1)
        self.trials = 0
        self._laboratory, self._images = trials, images
        self._expected = trials.run(converged, images).latents

    def distance(self, schedule: Schedule) -> float:
        """Relative L2 distance of the final latents.

        Raises:
            ScheduleError, VerificationError: the schedule diverges.
        """
        from goc_deploy.metrics.paired import whole_relative_l2  # needs NumPy, help texts do not

        return whole_relative_l2(
            self._laboratory.run(schedule, self._images).latents, self._expected
        )

    def error(self, schedule: Schedule) -> float:
        """`distance` as one more trial, infinite if the schedule diverges."""
        self.trials += 1
        self._laboratory.progress(f"search, trial {self.trials}", 0, 1)
        try:
            return self.distance(schedule)
        except (VerificationError, ScheduleError):
            return math.inf


def searched(options: SearchOptions, context: PolicyContext) -> Schedule:
    """``search``: the step count, computed steps and correction with the least error.

    The error is the distance to a converged solution. A correction in the SPEC is the only one
    tried; for one that calibrates, on the schedule that comes out, ``lagrange:2`` stands in.

    Raises:
        UsageError: a budget that pays for nothing, or a sampler with fresh noise.
    """
    trials = context.required_laboratory().trials()
    if trials.table(options.reference).stochastic:
        raise UsageError(
            f"sampler {trials.sampler!r} draws fresh noise, so there is no converged solution; "
            "use ddim or dpm++"
        )
    sizes = sizes_for(_computed_steps(options, context, trials), options.steps)
    judge = Judge(trials, uncached(context.spec, options.reference), trials.options)
    ranking = search(
        sizes,
        _corrections(context),
        lambda candidate: judge.error(_corrected(candidate, context)),
    )
    if not math.isfinite(ranking[0][0]):
        raise UsageError("every candidate diverges; raise the budget")
    best = ranking[0][1]
    schedule = _corrected(best, context) if context.correction is None else best.plain(context.spec)
    return replace(
        schedule, provenance={"search": _record(options, context, trials, judge, ranking)}
    )


def uncached(spec: ModelSpec, steps: int) -> Schedule:
    """Every unit computed at every step."""
    return Schedule(spec.depth, spec.branches, ((COMPUTE,) * spec.units,) * steps)


def _corrections(context: PolicyContext) -> tuple[str, ...]:
    """The corrections to try."""
    if context.correction is None:
        return CORRECTIONS_TRIED
    return (STAND_IN,) if context.correction_calibrates else (context.correction,)


def _corrected(candidate: Candidate, context: PolicyContext) -> Schedule:
    return context.correct(candidate.plain(context.spec), candidate.correction)


def _record(
    options: SearchOptions,
    context: PolicyContext,
    trials: Trials,
    judge: Judge,
    ranking: list[tuple[float, Candidate]],
) -> dict[str, object]:
    """What came of the search, with the error on images that it has not seen."""
    error, best = ranking[0]
    spec, ms = context.spec, "ms" if isinstance(options.budget, Milliseconds) else ""
    held_out = replace(trials.options, seed=trials.options.seed + 1)
    held_out_judge = Judge(trials, uncached(spec, options.reference), held_out)
    return {
        "budget": f"{options.budget:g}{ms}",
        **_described(best),
        "reference_steps": options.reference,
        "error": error,
        "held_out_seed": held_out.seed,
        "held_out_error": held_out_judge.distance(_corrected(best, context)),
        "held_out_error_of_as_many_uncached_steps": held_out_judge.distance(
            uncached(spec, len(best.computed))
        ),
        "trials": judge.trials,
        "best": [{"error": e, **_described(c)} for e, c in ranking[:SHOWN] if math.isfinite(e)],
        "calibration": trials.describe(),
    }


def _described(candidate: Candidate) -> dict[str, object]:
    return {
        "steps": candidate.steps,
        "computed": list(candidate.computed),
        "correction": candidate.correction,
    }


def _computed_steps(
    options: SearchOptions, context: PolicyContext, trials: Trials
) -> Callable[[int], int]:
    """Step count -> how many of the steps the budget allows to compute, by measured times."""
    budget = options.budget
    if not isinstance(budget, Milliseconds):
        return lambda _: int(budget)
    one, steps = replace(trials.options, images=1), CLOCKED[-1] + CLOCKED[1]
    full_ms = trials.run(uncached(context.spec, steps), one).step_ms["full"]
    total_ms = trials.run(_corrected(Candidate(steps, CLOCKED, STAND_IN), context), one).total_ms
    predicted_ms = (total_ms - len(CLOCKED) * full_ms) / (steps - len(CLOCKED))
    predicted_ms = min(max(predicted_ms, 0.0), full_ms / 2)  # single runs are noisy
    return lambda steps: max(
        0, math.floor((budget - steps * predicted_ms) / (full_ms - predicted_ms))
    )
