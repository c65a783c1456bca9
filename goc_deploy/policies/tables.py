"""The tables of policies and corrections, of which grammar, help and messages are made.

A new one is a function with its options dataclass (`goc_deploy.policies.options`), and a line here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic

from goc_deploy.policies import bases, budget, fit, goc, gradient, polynomials, search, smoothcache
from goc_deploy.policies.context import PolicyContext
from goc_deploy.policies.options import NoOptions, OptionsT
from goc_deploy.schedule import Schedule


@dataclass(frozen=True, slots=True)
class Base(Generic[OptionsT]):
    """A base policy.

    Attributes:
        make: (options, context) to the schedule.
        options: the frozen dataclass of its options, see `goc_deploy.policies.options`.
        help: a sentence.
        chooses_steps: whether it chooses the number of steps by itself.
        calibrates: whether it learns from images.
        registered: whether another package registered it.
    """

    make: Callable[[OptionsT, PolicyContext], Schedule]
    options: type[OptionsT]
    help: str = ""
    chooses_steps: bool = False
    calibrates: bool = False
    registered: bool = False


@dataclass(frozen=True, slots=True)
class Correction(Generic[OptionsT]):
    """A correction.

    Attributes:
        apply: (schedule of the base, options, context) to the corrected schedule.
        options: the frozen dataclass of its options, see `goc_deploy.policies.options`.
        help: a sentence.
        restrictable: whether ``both_branches`` is an option, for which the resolver undoes the
            correction in blocks that compute a branch.
        calibrates: whether it learns from images.
        registered: whether another package registered it.
    """

    apply: Callable[[Schedule, OptionsT, PolicyContext], Schedule]
    options: type[OptionsT]
    help: str = ""
    restrictable: bool = True
    calibrates: bool = False
    registered: bool = False


BASES: dict[str, Base[Any]] = {
    "none": Base(bases.compute_all, NoOptions, "Compute everything."),
    "fora": Base(bases.fora, bases.ForaOptions, "Compute whole steps at an even spacing (FORA)."),
    "compute": Base(bases.compute_steps, bases.ComputedStepsOptions, "Compute these steps."),
    "l2c": Base(bases.l2c, bases.RouterOptions, "Compute what a Learning-to-Cache router keeps."),
    "file": Base(bases.from_file, bases.FileOptions, "Do what a schedule file holds."),
    "search": Base(
        search.searched,
        budget.SearchOptions,
        "Compute whole steps that trials choose.",
        chooses_steps=True,
        calibrates=True,
    ),
    "smoothcache": Base(
        smoothcache.smoothcache,
        smoothcache.SmoothCacheOptions,
        "Reuse features while they change little (SmoothCache).",
        calibrates=True,
    ),
}
CORRECTIONS: dict[str, Correction[Any]] = {
    "gc": Correction(
        gradient.gradient_everywhere, gradient.GradientOptions, "The gradient (GOC without GOD)."
    ),
    "steps": Correction(
        gradient.gradient_at_steps, gradient.GradientStepsOptions, "The gradient at these steps."
    ),
    "taylor": Correction(
        polynomials.taylor, polynomials.PolynomialOptions, "A Taylor expansion (TaylorSeer)."
    ),
    "lagrange": Correction(
        polynomials.lagrange, polynomials.PolynomialOptions, "The polynomial through past features."
    ),
    "hermite": Correction(
        polynomials.hermite,
        polynomials.HermiteOptions,
        "A Taylor expansion in Hermite polynomials (HiCache).",
    ),
    "goc": Correction(
        goc.goc,
        goc.GocOptions,
        "The gradient where GOD allows it (GOC).",
        restrictable=False,
        calibrates=True,
    ),
    "fit": Correction(
        fit.fit, fit.FitOptions, "Fitted coefficients.", restrictable=False, calibrates=True
    ),
}
BASE_NAMES, CORRECTION_NAMES = tuple(BASES), tuple(CORRECTIONS)  # goc_deploy's own
