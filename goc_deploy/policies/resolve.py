"""Policies: what makes a schedule. A SPEC such as ``fora:2+gc:1.2,history=computed`` names one.

A base decides what is computed, a correction how the rest is predicted, and a head corrects the
latents.
`goc_deploy.policies.tables` has goc_deploy's own; `goc_deploy.policies.registration` has those of
other packages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from goc_deploy.errors import GocError, UsageError
from goc_deploy.policies.calibration import Laboratory
from goc_deploy.policies.context import PolicyContext, ReadRouter
from goc_deploy.policies.gradient import only_where_all_branches_are_reused
from goc_deploy.policies.grammar import Policy, parse_policy
from goc_deploy.policies.head import HeadOptions, check_head
from goc_deploy.policies.options import NoOptions, filled, option, option_names
from goc_deploy.policies.registration import base_named, correction_named, registered_names
from goc_deploy.policies.suggestions import hint_for_correction, hint_for_policy
from goc_deploy.policies.tables import Base, Correction
from goc_deploy.schedule import (
    Schedule,
    check_schedule,
    check_schedule_fits,
    check_whole_steps,
    fill_short_history,
)
from goc_deploy.schedule.schedule import HistoryKind, Level
from goc_deploy.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class CommonOptions:
    """Options of every SPEC."""

    history: HistoryKind | None = option(
        "Whether predictions read all features that were used, or only computed ones. Without it, "
        "polynomials read computed ones, and all other policies used ones.",
        default=None,
    )
    level: Level | None = option(
        "What is predicted: the feature of every unit, or one residual for all units of a step, "
        "which the policy must then treat alike. Without it, units.",
        default=None,
    )


@dataclass(frozen=True, slots=True)
class RestrictionOptions:
    """Options of a correction that is restrictable."""

    both_branches: bool = option(
        "Correct only where all branches of a block are reused; not with +fit.", default=False
    )


def schedule_from_policy(
    policy: Policy,
    spec: ModelSpec,
    steps: int,
    laboratory: Laboratory | None = None,
    read_router: ReadRouter | None = None,
    head: HeadOptions | None = None,
) -> Schedule:
    """Make the schedule that a SPEC names, for a model and a step count.

    Args:
        policy: the SPEC.
        spec: the model.
        steps: sampling steps; ``search`` chooses its own.
        laboratory: used by policies that learn, and by no other.
        read_router: used by ``l2c``; see `goc_deploy.policies.context.PolicyContext`.
        head: the options of the SPEC's head, if the caller completed them.

    Raises:
        UsageError: an unknown name, an argument or option of the SPEC that is out of range, or a
            registered policy that raises or returns no schedule.
        EnvironmentUnsupportedError: the package of an installed policy cannot be imported, or a
            router is to be read and ``read_router`` is None.
        ScheduleError: a schedule file is wrong or does not fit.
        ModelError, SafetyError: a router file is unreadable or asks to run code.
    """
    try:
        parts = _parts(policy)
        context = PolicyContext(
            spec,
            steps,
            correct=lambda schedule, text: _tried(parts.as_asked(schedule), text, spec),
            options=dict(policy.options),
            correction=_written(policy.correction),
            correction_calibrates=parts.correction is not None and parts.correction.calibrates,
            head=head or head_from_policy(policy),
            laboratory=laboratory,
            read_router=read_router,
        )
        schedule = parts.base.make(parts.base_options, context)
        wanted = schedule.steps if parts.base.chooses_steps else steps
        check_schedule_fits(schedule, spec, wanted)
        schedule = parts.corrected(
            replace(parts.as_asked(schedule), history=parts.history or schedule.history), context
        )
        schedule = replace(fill_short_history(schedule), policy=policy.recorded)
        check_schedule(schedule)
    except GocError as error:
        raise type(error)(f"SPEC {policy.text!r}: {error}") from error
    return schedule


def head_from_policy(policy: Policy) -> HeadOptions | None:
    """The options of the head that a SPEC asks for, or None if it has no head.

    Raises:
        UsageError: FEATURES or an option is out of range.
    """
    if policy.head is None:
        return None
    try:
        return check_head(filled(HeadOptions, "head", policy.head, dict(policy.options)))
    except UsageError as error:
        raise UsageError(f"SPEC {policy.text!r}: {error}") from error


@dataclass(frozen=True, slots=True)
class _Parts:
    """A SPEC as functions with their options.

    Attributes:
        base: the base.
        base_options: an instance of its options dataclass.
        history: the kind of history that the SPEC names, or None.
        level: what the SPEC asks to predict, or None.
        correction: the correction, or None.
        correction_options: an instance of its options dataclass.
        both_branches: whether to undo the correction in blocks that compute a branch.
    """

    base: Base[Any]
    base_options: Any
    history: HistoryKind | None
    level: Level | None
    correction: Correction[Any] | None = None
    correction_options: Any = None
    both_branches: bool = False

    def as_asked(self, schedule: Schedule) -> Schedule:
        """The schedule with the level that the SPEC asks for, if any.

        Raises:
            ScheduleError: its residual is to be predicted, but units of a step differ.
        """
        schedule = replace(schedule, level=self.level or schedule.level)
        check_whole_steps(schedule)
        return schedule

    def corrected(self, schedule: Schedule, context: PolicyContext) -> Schedule:
        """The schedule of the base after the correction.

        Raises:
            UsageError: the correction reads another kind of history than the SPEC names.
        """
        if self.correction is None:
            return schedule
        corrected = self.correction.apply(schedule, self.correction_options, context)
        if self.history and corrected.history != self.history:
            raise UsageError(
                f"this correction reads {corrected.history} features only; "
                f"leave out history={self.history}"
            )
        if self.both_branches:
            return only_where_all_branches_are_reused(schedule, corrected)
        return corrected


def _parts(policy: Policy) -> _Parts:
    """Look up the names of a SPEC, and fill their options dataclasses."""
    base_name, base_argument = policy.base
    base, pairs = base_named(base_name), dict(policy.options)
    head = NoOptions if policy.head is None else HeadOptions
    if base is None:
        raise UsageError(f"unknown policy {base_name!r}; {hint_for_policy(base_name)}{_more()}")
    asked = filled(CommonOptions, base_name, "", pairs)
    common = asked.history, asked.level
    if policy.correction is None:
        _check_names(pairs, CommonOptions, base.options, head)
        return _Parts(base, filled(base.options, base_name, base_argument, pairs), *common)
    name, argument = policy.correction
    correction = correction_named(name)
    if correction is None:
        raise UsageError(f"unknown correction {name!r}; {hint_for_correction(name)}{_more()}")
    restriction = RestrictionOptions if correction.restrictable else NoOptions
    _check_names(pairs, CommonOptions, base.options, restriction, correction.options, head)
    return _Parts(
        base,
        filled(base.options, base_name, base_argument, pairs),
        *common,
        correction,
        filled(correction.options, name, argument, pairs),
        correction.restrictable and filled(RestrictionOptions, name, "", pairs).both_branches,
    )


def _check_names(pairs: Mapping[str, str], *options: type) -> None:
    allowed = [name for one in options for name in option_names(one)]
    for name in pairs:
        if name not in allowed:
            raise UsageError(
                f"option {name!r} is not one of {', '.join(allowed)}, which this policy takes"
            )


def _tried(schedule: Schedule, text: str, spec: ModelSpec) -> Schedule:
    """`PolicyContext.correct`: a correction as if ``none`` were the base, without options."""
    policy = parse_policy(f"none+{text}")
    context = PolicyContext(spec, schedule.steps, lambda other, more: _tried(other, more, spec))
    return fill_short_history(_parts(policy).corrected(schedule, context))


def _more() -> str:
    names = registered_names()
    return f"; registered are {', '.join(names)}" if names else ""


def _written(named_argument: tuple[str, str] | None) -> str | None:
    return None if named_argument is None else ":".join(named_argument).removesuffix(":")
