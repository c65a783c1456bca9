"""What a search may spend."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from goc_deploy.policies.calibration import MAX_IMAGES, Trials
from goc_deploy.policies.candidates import MAX_SEARCHED_STEPS, Candidate, uncached
from goc_deploy.policies.context import PolicyContext
from goc_deploy.policies.options import Milliseconds, argument, option
from goc_deploy.schedule import Schedule

STAND_IN = "lagrange:2"  # for corrections that calibrate, which need the schedule first
CLOCKED = (0, 3, 6, 9)  # computed steps, of 12, of the run that shows what a predicted step takes


@dataclass(frozen=True, slots=True)
class SearchOptions:
    """Options of ``search``."""

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
    trials: int = option(
        "With a head: the largest number of trials, each of which fits a head.",
        default=64,
        low=1,
        high=10_000,
    )
    search_images: int | None = option(
        "With a head: calibration images of a trial; half of them only judge. Without it, as many "
        "as the head has, at most 128.",
        default=None,
        low=16,
        high=MAX_IMAGES,
    )

    @property
    def budget_text(self) -> str:
        """The budget as a SPEC writes it."""
        return f"{self.budget:g}{'ms' if isinstance(self.budget, Milliseconds) else ''}"


def corrected(candidate: Candidate, context: PolicyContext) -> Schedule:
    """The schedule of a candidate, with its correction."""
    return context.correct(candidate.plain(context.spec), candidate.correction)


def computed_steps_within(
    budget: int | Milliseconds, context: PolicyContext, trials: Trials
) -> Callable[[int], int]:
    """Step count -> how many of the steps the budget allows to compute, by measured times."""
    if not isinstance(budget, Milliseconds):
        return lambda _: int(budget)
    one, steps = replace(trials.options, images=1), CLOCKED[-1] + CLOCKED[1]
    full_ms = trials.run(uncached(context.spec, steps), one).step_ms["full"]
    total_ms = trials.run(corrected(Candidate(steps, CLOCKED, STAND_IN), context), one).total_ms
    predicted_ms = (total_ms - len(CLOCKED) * full_ms) / (steps - len(CLOCKED))
    predicted_ms = min(max(predicted_ms, 0.0), full_ms / 2)  # single runs are noisy
    return lambda steps: max(
        0, math.floor((budget - steps * predicted_ms) / (full_ms - predicted_ms))
    )
