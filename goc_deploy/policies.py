"""Policies: what makes a schedule. A SPEC such as ``fora:2+gc:1.2,history=computed`` names one.

Grammar: ``BASE[+CORRECTION][,OPTION]...`` with

    BASE        none | fora:INTERVAL[@FRACTION] | file:SCHEDULE.json
    CORRECTION  gc[:ETA] | steps:K,K,...:ETA
    OPTION      history=used|computed
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

from goc_deploy.errors import UsageError
from goc_deploy.schedule import (
    COMPUTE,
    HISTORY_KINDS,
    REUSE,
    Schedule,
    check_schedule,
    check_schedule_fits,
    fill_short_history,
    gradient,
)
from goc_deploy.spec import ModelSpec

DEFAULT_ETA = 1.0
GRAMMAR = (
    "none, fora:INTERVAL[@FRACTION] or file:SCHEDULE.json, then +gc[:ETA] or +steps:K,K,..:ETA, then ,history=computed"
)
_OPTION = re.compile(r",(?=[a-z_]+=)")
_PLAN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=,@-]{0,99}")


@dataclass(frozen=True, slots=True)
class PolicySpec:
    """A parsed SPEC.

    Attributes:
        text: the SPEC as written.
        base: (name, argument) of the part that says what is computed.
        correction: (name, argument) of the part that says how reused units are predicted, or None.
        history: the history kind, or None where the base decides.
    """

    text: str
    base: tuple[str, str]
    correction: tuple[str, str] | None
    history: str | None

    @property
    def default_name(self) -> str:
        """The SPEC made file-safe."""
        name, argument = self.base
        text = self.text.replace(f"file:{argument}", f"file:{Path(argument).stem}") if name == "file" else self.text
        return plan_name_from_spec(text)


def plan_name_from_spec(spec: str) -> str:
    """A SPEC made file-safe, which is a plan's default name."""
    return re.sub(r"[^A-Za-z0-9._+=,@-]", "-", spec)[:100]


def check_plan_name(name: str) -> str:
    """Return ``name`` if it can name a file anywhere, else raise UsageError."""
    if not _PLAN_NAME.fullmatch(name):
        raise UsageError(
            f"plan name {name!r} must be 1 to 100 letters, digits or ._+=,@- and start with a letter or digit"
        )
    return name


def parse_policy(text: str) -> PolicySpec:
    """Parse a SPEC.

    Raises:
        UsageError: with the part that is wrong and the grammar.
    """
    head, *options = _OPTION.split(text.strip())
    if head.startswith("file:") and not re.search(r"\+(gc|steps)\b[^/\\]*$", head):
        parts = [head]
    else:
        parts = head.rsplit("+", 1) if head.startswith("file:") else head.split("+")
    if len(parts) > 2:
        raise UsageError(f"SPEC {text!r}: more than one '+'; the form is {GRAMMAR}")
    base = _named_argument(parts[0])
    correction = _named_argument(parts[1]) if len(parts) == 2 else None
    if base[0] not in _BASES:
        raise UsageError(f"SPEC {text!r}: unknown policy {base[0]!r}; the form is {GRAMMAR}")
    if correction and correction[0] not in _CORRECTIONS:
        raise UsageError(f"SPEC {text!r}: unknown correction {correction[0]!r}; the form is {GRAMMAR}")
    history = None
    for option in options:
        key, _, value = option.partition("=")
        if key != "history" or value not in HISTORY_KINDS:
            raise UsageError(
                f"SPEC {text!r}: unknown option {option!r}; the only one is history=used or history=computed"
            )
        history = value
    return PolicySpec(text.strip(), base, correction, history)


def schedule_from_policy(policy: PolicySpec, spec: ModelSpec, steps: int) -> Schedule:
    """Make the schedule that a SPEC names, for a model and a step count.

    Raises:
        UsageError: an argument of the SPEC is out of range.
        ScheduleError: a schedule file is wrong or does not fit.
    """
    try:
        schedule = _BASES[policy.base[0]](policy.base[1], spec, steps)
        if policy.history:
            schedule = replace(schedule, history=policy.history)
        if policy.correction:
            schedule = _CORRECTIONS[policy.correction[0]](schedule, policy.correction[1])
        schedule = replace(fill_short_history(schedule), policy=policy.text)
        check_schedule_fits(schedule, spec, steps)
        check_schedule(schedule)
    except UsageError as error:  # or a ScheduleError, which is one
        raise type(error)(f"SPEC {policy.text!r}: {error}") from error
    return schedule


def _named_argument(part: str) -> tuple[str, str]:
    name, _, argument = part.partition(":")
    return name, argument


def _number(text: str, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise UsageError(f"{what} {text!r} is not a number") from None
    if not abs(value) < 1e3:
        raise UsageError(f"{what} {text} is out of range")
    return value


def _compute_all(argument: str, spec: ModelSpec, steps: int) -> Schedule:
    if argument:
        raise UsageError("'none' takes no argument")
    return Schedule(spec.depth, spec.branches, ((COMPUTE,) * spec.units,) * steps)


def _fora(argument: str, spec: ModelSpec, steps: int) -> Schedule:
    interval_text, at, fraction_text = argument.partition("@")
    if not interval_text.isdecimal() or not 1 <= int(interval_text) <= 1000:
        raise UsageError(f"interval {interval_text!r} must be a whole number from 1 to 1000")
    if at and not 0 < _number(fraction_text, "fraction") <= 1:
        raise UsageError(f"fraction {fraction_text} must be above 0 and at most 1")
    fraction = Fraction(fraction_text) if at else Fraction(1)  # exact: 0.55 of 20 steps is 11, not a little more
    interval = int(interval_text)
    reused = (k % interval != 0 and k < fraction * steps for k in range(steps))
    return Schedule(spec.depth, spec.branches, tuple(((REUSE if r else COMPUTE),) * spec.units for r in reused))


def _from_file(argument: str, _spec: ModelSpec, _steps: int) -> Schedule:
    if not argument:
        raise UsageError("'file:' needs a path")
    return Schedule.load(argument)


def _gradient_wherever_history_allows(schedule: Schedule, argument: str) -> Schedule:
    eta = _number(argument, "eta") if argument else DEFAULT_ETA
    return _with_gradient(schedule, set(range(schedule.steps)), eta)


def _gradient_at_steps(schedule: Schedule, argument: str) -> Schedule:
    steps_text, _, eta_text = argument.partition(":")
    if not all(part.isdecimal() for part in steps_text.split(",")):
        raise UsageError(f"steps {steps_text!r} must be whole numbers separated by commas")
    steps = {int(part) for part in steps_text.split(",")}
    if max(steps) >= schedule.steps:
        raise UsageError(f"step {max(steps)} is beyond the last step {schedule.steps - 1}")
    return _with_gradient(schedule, steps, _number(eta_text, "eta") if eta_text else DEFAULT_ETA)


def _with_gradient(schedule: Schedule, steps: set[int], eta: float) -> Schedule:
    """Turn plain reuse into gradient reuse at these steps; where history is short plain reuse stays (as GOC does)."""
    rows = tuple(
        tuple(gradient(eta) if row == REUSE and k in steps else row for row in step)
        for k, step in enumerate(schedule.coefficients)
    )
    return replace(schedule, coefficients=rows, short_history="reuse")


_BASES: dict[str, Callable[[str, ModelSpec, int], Schedule]] = {"none": _compute_all, "fora": _fora, "file": _from_file}
_CORRECTIONS: dict[str, Callable[[Schedule, str], Schedule]] = {
    "gc": _gradient_wherever_history_allows,
    "steps": _gradient_at_steps,
}
