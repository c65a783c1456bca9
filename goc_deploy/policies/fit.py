"""The correction ``fit``: coefficients fitted by least squares on calibration images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from goc_deploy.policies.context import PolicyContext
from goc_deploy.policies.options import argument, option
from goc_deploy.schedule import MAX_HISTORY, Schedule

Granularity = Literal["step", "global"]


@dataclass(frozen=True, slots=True)
class FitOptions:
    """Options of `fit`: how the coefficients are fitted to the final latents without cache.

    Attributes:
        entries: history entries that a prediction may read.
        granularity: coefficients of their own for every ``step``, or ``global``: the same wherever
            as many entries are stored.
        ridge: pull toward where an iteration starts, as a share of each weight's own square.
    """

    entries: int = argument(
        "History entries that a prediction reads.",
        default=2,
        form="N",
        low=1,
        high=MAX_HISTORY,
    )
    granularity: Granularity = option(
        "Whether every step has coefficients of its own, or all steps share them.",
        default="step",
        name="fit",
    )
    ridge: float = option("Strength of the regularization.", default=1e-2, above=0)


def fit(schedule: Schedule, options: FitOptions, context: PolicyContext) -> Schedule:
    """``fit``: coefficients over N history entries, fitted along the cached trajectory."""
    return context.required_laboratory().calibrator(schedule.steps).fit(schedule, options)
