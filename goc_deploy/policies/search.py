"""The base policy ``search``: `goc_deploy.policies.candidates`, measured on an engine."""

from __future__ import annotations

import math
from dataclasses import replace

from goc_deploy.errors import ScheduleError, UsageError, VerificationError
from goc_deploy.policies.budget import STAND_IN, SearchOptions, computed_steps_within, corrected
from goc_deploy.policies.calibration import CalibrationOptions, Trials
from goc_deploy.policies.candidates import Candidate, search, sizes_for, uncached
from goc_deploy.policies.context import PolicyContext
from goc_deploy.policies.head_search import searched_with_head
from goc_deploy.schedule import Schedule

CORRECTIONS_TRIED = ("gc:1.0", "taylor:2", "lagrange:1", "lagrange:2", "lagrange:3", "hermite:2")
SHOWN = 10


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
        self._expected = trials.aim(converged, images)

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
    tried; for one that calibrates, on the schedule that comes out, ``lagrange:2`` stands in. With
    a head in the SPEC, candidates are judged with heads, see `goc_deploy.policies.head_search`.

    Raises:
        UsageError: a budget that pays for nothing, a sampler with fresh noise, or an option that is
            for searches with a head.
    """
    if context.head is not None:
        return searched_with_head(options, context, context.head)
    for name in ("trials", "search_images"):
        if name in context.options:
            raise UsageError(f"option {name} is for a search with a head; leave it out")
    trials = context.required_laboratory().trials()
    if trials.table(options.reference).stochastic:
        raise UsageError(
            f"sampler {trials.sampler!r} draws fresh noise, so there is no converged solution; "
            "use ddim or dpm++"
        )
    sizes = sizes_for(computed_steps_within(options.budget, context, trials), options.steps)
    judge = Judge(trials, uncached(context.spec, options.reference), trials.options)
    ranking = search(
        sizes,
        _corrections(context),
        lambda candidate: judge.error(corrected(candidate, context)),
    )
    if not math.isfinite(ranking[0][0]):
        raise UsageError("every candidate diverges; raise the budget")
    best = ranking[0][1]
    schedule = corrected(best, context) if context.correction is None else best.plain(context.spec)
    return replace(
        schedule, provenance={"search": _record(options, context, trials, judge, ranking)}
    )


def _corrections(context: PolicyContext) -> tuple[str, ...]:
    """The corrections to try."""
    if context.correction is None:
        return CORRECTIONS_TRIED
    return (STAND_IN,) if context.correction_calibrates else (context.correction,)


def _record(
    options: SearchOptions,
    context: PolicyContext,
    trials: Trials,
    judge: Judge,
    ranking: list[tuple[float, Candidate]],
) -> dict[str, object]:
    """What came of the search, with the error on images that it has not seen."""
    error, best = ranking[0]
    spec = context.spec
    held_out = replace(trials.options, seed=trials.options.seed + 1)
    held_out_judge = Judge(trials, uncached(spec, options.reference), held_out)
    return {
        "budget": options.budget_text,
        **_described(best),
        "reference_steps": options.reference,
        "error": error,
        "held_out_seed": held_out.seed,
        "held_out_error": held_out_judge.distance(corrected(best, context)),
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
