"""Policies: what makes a schedule. A SPEC such as ``fora:2+gc:1.2,history=computed`` names one.

A base says what is computed, a correction how the rest is predicted. The modules of this folder have
the arguments and options of each; `goc_deploy.policies.registration` has those of other packages.
"""

from __future__ import annotations

from dataclasses import replace

from goc_deploy.errors import GocError, UsageError
from goc_deploy.policies import bases
from goc_deploy.policies.calibration import Laboratory
from goc_deploy.policies.context import PolicyContext, ReadRouter
from goc_deploy.policies.fit import fit
from goc_deploy.policies.goc import goc
from goc_deploy.policies.gradient import (
    gradient_at_steps,
    gradient_everywhere,
    only_where_all_branches_are_reused,
)
from goc_deploy.policies.grammar import PolicySpec
from goc_deploy.policies.polynomials import hermite, lagrange, taylor
from goc_deploy.policies.registration import (
    BASES,
    CORRECTIONS,
    Base,
    Correction,
    base_named,
    correction_named,
    registered_names,
)
from goc_deploy.policies.search import searched
from goc_deploy.policies.smoothcache import smoothcache
from goc_deploy.policies.suggestions import hint_for_correction, hint_for_policy
from goc_deploy.schedule import (
    HISTORY_KINDS,
    HistoryKind,
    Schedule,
    check_schedule,
    check_schedule_fits,
    fill_short_history,
)
from goc_deploy.spec import ModelSpec

COMMON_OPTIONS = ("history",)


BASES.update(
    {
        "none": Base(bases.compute_all),
        "fora": Base(bases.fora, ("phase",)),
        "l2c": Base(bases.l2c),
        "file": Base(bases.from_file),
        "search": Base(searched, ("steps", "reference", "units"), chooses_steps=True),
        "smoothcache": Base(smoothcache, ("per_unit",)),
    }
)
CORRECTIONS.update(
    {
        "gc": Correction(gradient_everywhere),
        "steps": Correction(gradient_at_steps),
        "taylor": Correction(taylor),
        "lagrange": Correction(lagrange),
        "hermite": Correction(hermite),
        "goc": Correction(goc, ("both_branches", "gamma", "threshold", "reading", "per_unit")),
        "fit": Correction(fit, ("fit", "target", "ridge")),
    }
)


def schedule_from_policy(
    policy: PolicySpec,
    spec: ModelSpec,
    steps: int,
    laboratory: Laboratory | None = None,
    read_router: ReadRouter | None = None,
) -> Schedule:
    """Make the schedule that a SPEC names, for a model and a step count.

    Args:
        policy: the SPEC.
        spec: the model.
        steps: sampling steps; ``search`` chooses its own.
        laboratory: asked by policies that learn, and by no other.
        read_router: asked by ``l2c``; see `goc_deploy.policies.context.PolicyContext`.

    Raises:
        UsageError: an unknown name, an argument or option of the SPEC that is out of range, or a registered policy that
            raises or returns no schedule.
        EnvironmentUnsupportedError: the package of an installed policy cannot be imported, or a router is to be read
            and ``read_router`` is None.
        ScheduleError: a schedule file is wrong or does not fit.
        ModelError, SafetyError: a router file is unreadable or asks to run code.
    """
    try:
        base, correction = _named(policy)
        context = PolicyContext(
            spec, steps, dict(policy.options), _written(policy.correction), laboratory, read_router
        )
        schedule = base.make(policy.base[1], context)
        check_schedule_fits(schedule, spec, schedule.steps if base.chooses_steps else steps)
        schedule = replace(schedule, history=_history(context, schedule.history))
        if policy.correction and correction:
            corrected = correction.apply(schedule, policy.correction[1], context)
            every = "both_branches" not in context.options
            schedule = (
                corrected if every else only_where_all_branches_are_reused(schedule, corrected)
            )
        schedule = replace(schedule, history=_history(context, schedule.history))
        schedule = replace(fill_short_history(schedule), policy=policy.recorded)
        check_schedule(schedule)
    except GocError as error:
        raise type(error)(f"SPEC {policy.text!r}: {error}") from error
    return schedule


def _named(policy: PolicySpec) -> tuple[Base, Correction | None]:
    """The base and the correction that a SPEC names, once its options are known to belong to them."""
    base = base_named(policy.base[0])
    if base is None:
        raise UsageError(
            f"unknown policy {policy.base[0]!r}; {hint_for_policy(policy.base[0])}{_more()}"
        )
    correction = correction_named(policy.correction[0]) if policy.correction else None
    if policy.correction and correction is None:
        raise UsageError(
            f"unknown correction {policy.correction[0]!r}; {hint_for_correction(policy.correction[0])}{_more()}"
        )
    allowed = (*COMMON_OPTIONS, *base.options, *(correction.options if correction else ()))
    for option, _ in policy.options:
        if option not in allowed:
            raise UsageError(
                f"option {option!r} is not one of {', '.join(allowed)}, which this policy takes"
            )
    return base, correction


def _more() -> str:
    names = registered_names()
    return f"; registered are {', '.join(names)}" if names else ""


def _written(named_argument: tuple[str, str] | None) -> str | None:
    return None if named_argument is None else ":".join(named_argument).removesuffix(":")


def _history(context: PolicyContext, own: HistoryKind) -> HistoryKind:
    history = context.options.get("history", own)
    for kind in HISTORY_KINDS:
        if kind == history:
            return kind
    raise UsageError(f"history {history!r} must be {' or '.join(HISTORY_KINDS)}")
