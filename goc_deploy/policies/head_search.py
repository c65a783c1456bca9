"""The base policy ``search`` with a head: every trial fits a head for the steps that it tries.

Steps at which a model alone is best are not those at which it is best with a head, which learns
what predictions miss. Candidates are therefore judged with heads, fitted on some images and
measured on others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from goc_deploy.errors import UsageError
from goc_deploy.policies.budget import STAND_IN, SearchOptions, computed_steps_within, corrected
from goc_deploy.policies.calibration import HeadTrials
from goc_deploy.policies.candidates import (
    MAX_SEARCHED_STEPS,
    Candidate,
    search_by_exchange,
    sizes_for,
)
from goc_deploy.policies.context import PolicyContext
from goc_deploy.policies.head import HELD_OUT_EVERY, HeadOptions, default_head_images
from goc_deploy.samplers.head import HeadFeatures
from goc_deploy.schedule import Schedule

DEFAULT_TRIAL_IMAGES = 128
FEWEST_TRIAL_IMAGES = 2 * HELD_OUT_EVERY  # half of them judge
STEP_COUNTS = (1, 2, 4)  # multiples of the computed steps; each needs a converged solution
FINEST = (4,)  # without predicted steps the count is only how finely steps can be placed
FINALISTS = 3  # that are fitted with the features of the SPEC


@dataclass(frozen=True, slots=True)
class _Ranked:
    """A candidate and its error with a head of some features."""

    error: float
    candidate: Candidate
    features: HeadFeatures

    @property
    def record(self) -> dict[str, object]:
        """Plain data for the schedule file."""
        candidate = self.candidate
        return {
            "steps": candidate.steps,
            "computed": list(candidate.computed),
            "features": self.features,
            "error": self.error,
        }


def searched_with_head(
    options: SearchOptions, context: PolicyContext, head: HeadOptions
) -> Schedule:
    """``search`` with a head: the step count and the computed steps with the least error.

    The error is the mean distance to what the head aims at. Trials of a head that reads tokens
    read patches, which takes a fraction of the time; the best few are fitted as asked.

    Raises:
        UsageError: a budget that pays for nothing or for everything, a sampler that cannot have
            this head, or an option that does not go with a head.
    """
    if "reference" in context.options:
        raise UsageError(
            "option reference is for a search without a head; with one, option target is what "
            "candidates are compared with"
        )
    laboratory = context.required_laboratory()
    sizes = _sizes(options, context, head)
    correction = _correction(context)
    images = options.search_images or _default_images(context, head)
    ranking_features: HeadFeatures = "patch" if head.form.reads_tokens else head.features
    with laboratory.head_trials(head, images) as trials:
        measure = _measure(context, head, trials)
        tried = search_by_exchange(
            sizes, correction, lambda one: measure(one, ranking_features), options.trials
        )
        ranking = [_Ranked(error, one, ranking_features) for error, one in tried]
        if not math.isfinite(ranking[0].error):
            raise UsageError("every candidate diverges; raise the budget")
        if ranking_features != head.features:
            finalists = [one.candidate for one in ranking[:FINALISTS]]
            judged = [_Ranked(measure(o, head.features), o, head.features) for o in finalists]
            ranking = [*sorted(judged, key=lambda one: one.error), *ranking]
        record = _record(options, head, ranking)
        record["calibration"] = trials.describe()
    best = ranking[0].candidate
    leave_plain = context.correction is not None or head.skip_predicted
    schedule = best.plain(context.spec) if leave_plain else corrected(best, context)
    return replace(schedule, provenance={"search": record})


def _measure(
    context: PolicyContext, head: HeadOptions, trials: HeadTrials
) -> Callable[[Candidate, HeadFeatures], float]:
    def measure(candidate: Candidate, features: HeadFeatures) -> float:
        plain = candidate.plain(context.spec)
        schedule = plain if head.skip_predicted else corrected(candidate, context)
        return trials.error(schedule, features)

    return measure


def _correction(context: PolicyContext) -> str:
    """How trials predict."""
    if context.correction is None or context.correction_calibrates:
        return STAND_IN
    return context.correction


def _sizes(
    options: SearchOptions, context: PolicyContext, head: HeadOptions
) -> Sequence[tuple[int, int]]:
    """(steps, computed steps) to try.

    Raises:
        UsageError: the budget pays for no step, or for all.
    """
    trials = context.required_laboratory().trials()
    within = computed_steps_within(options.budget, context, trials)
    # Steps that are left out take no time.
    all_paid = max((n for n in range(1, MAX_SEARCHED_STEPS + 1) if within(n) >= n), default=0)

    def count_at(steps: int) -> int:
        return all_paid if head.skip_predicted else within(steps)

    fixed = options.steps
    if fixed is None and head.target == "uncached":
        fixed = context.steps
    sizes = sizes_for(count_at, fixed, FINEST if head.skip_predicted else STEP_COUNTS)
    if fixed is not None and sizes[0][1] >= fixed:
        raise UsageError(
            f"the budget pays for all {fixed} steps, so there is nothing to search; lower it, "
            "raise option steps, or use none+head"
        )
    return sizes


def _default_images(context: PolicyContext, head: HeadOptions) -> int:
    images = head.images or default_head_images(context.spec, context.steps)
    return max(FEWEST_TRIAL_IMAGES, min(images, DEFAULT_TRIAL_IMAGES))


def _record(
    options: SearchOptions, head: HeadOptions, ranking: Sequence[_Ranked]
) -> dict[str, object]:
    """What came of the search."""
    best = ranking[0]
    record = best.record
    if not head.skip_predicted:
        record["correction"] = best.candidate.correction
    return {
        "budget": options.budget_text,
        **record,
        "target": head.target,
        "trials": len(ranking),
        "tried": [one.record for one in ranking if math.isfinite(one.error)],
    }
