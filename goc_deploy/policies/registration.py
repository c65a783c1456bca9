"""Policies and corrections of other packages: how they register, and how an installed one is found.

An installed package names its own under the entry point group ``goc_deploy.policies.resolve``. Their names are read from the
package's metadata; its code is imported if a SPEC uses such a name, and at no other time.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, TypeVar

from goc_deploy.errors import EnvironmentUnsupportedError, GocError, UsageError
from goc_deploy.schedule import Schedule

if TYPE_CHECKING:
    from goc_deploy.policies.context import PolicyContext


ENTRY_POINTS = "goc_deploy.policies"
_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")
_OPTION = re.compile(r"[a-z][a-z_]{0,31}")

MakeSchedule = Callable[[str, "PolicyContext"], Schedule]
CorrectSchedule = Callable[[Schedule, str, "PolicyContext"], Schedule]
MakeT = TypeVar("MakeT", bound=MakeSchedule)
CorrectT = TypeVar("CorrectT", bound=CorrectSchedule)


@dataclass(frozen=True, slots=True)
class Base:
    """A base policy.

    Attributes:
        make: (argument, context) to the schedule.
        options: names of the options that it reads.
        chooses_steps: whether it chooses the number of steps by itself.
        registered: whether it was registered, and is none of goc_deploy's own.
    """

    make: MakeSchedule
    options: tuple[str, ...] = ()
    chooses_steps: bool = False
    registered: bool = False


@dataclass(frozen=True, slots=True)
class Correction:
    """A correction.

    Attributes:
        apply: (schedule of the base, argument, context) to the corrected schedule.
        options: names of the options that it reads.
        registered: whether it was registered, and is none of goc_deploy's own.
    """

    apply: CorrectSchedule
    options: tuple[str, ...] = ("both_branches",)
    registered: bool = False


BASES: dict[str, Base] = {}
CORRECTIONS: dict[str, Correction] = {}


def register_policy(
    name: str, *, options: tuple[str, ...] = (), chooses_steps: bool = False
) -> Callable[[MakeT], MakeT]:
    """Decorator: a SPEC may have ``name[:ARGUMENT]`` as its base.

    The function takes the SPEC's argument, "" where there is none, and a `goc_deploy.policies.context.PolicyContext`, and returns the
    `goc_deploy.Schedule` of ``context.steps`` steps. Its ``coefficients`` are [T][U] tuples over the history, newest first:
    ``()`` computes a unit and ``(1.0,)`` reuses it.

    Args:
        name: lower-case letters, digits and underscores, at most 32.
        options: names of the options ``,OPTION=VALUE`` of a SPEC that the function reads in ``context.options``.
        chooses_steps: the number of steps is that of the schedule, not ``context.steps``.

    Raises:
        UsageError: the name is taken by another function, or a name has another form.
    """

    def register(make: MakeT) -> MakeT:
        _built_in()
        _check(name, options, make, BASES[name].make if name in BASES else None)
        BASES[name] = Base(_guarded(make), options, chooses_steps, registered=True)
        return make

    return register


def register_correction(
    name: str, *, options: tuple[str, ...] = ()
) -> Callable[[CorrectT], CorrectT]:
    """Decorator: a SPEC may have ``+name[:ARGUMENT]`` as its correction.

    The function takes the schedule of the base, the argument, "" where there is none, and a
    `goc_deploy.policies.context.PolicyContext`, and returns the schedule with other coefficients where the base has ``(1.0,)``. With
    ``short_history="reuse"`` in the schedule, an evaluation that reads more than is stored reuses plainly.

    Args:
        name: lower-case letters, digits and underscores, at most 32.
        options: names of the options ``,OPTION=VALUE`` of a SPEC that the function reads in ``context.options``.

    Raises:
        UsageError: the name is taken by another function, or a name has another form.
    """

    def register(apply: CorrectT) -> CorrectT:
        _built_in()
        _check(name, options, apply, CORRECTIONS[name].apply if name in CORRECTIONS else None)
        CORRECTIONS[name] = Correction(
            _guarded(apply), ("both_branches", *options), registered=True
        )
        return apply

    return register


def base_named(name: str) -> Base | None:
    """The base policy of that name, whose package is imported where it is an installed one, or None.

    Raises:
        EnvironmentUnsupportedError: two packages have one of that name, or importing its package fails.
    """
    _built_in()
    if name not in BASES:
        _import_installed(name)
    return BASES.get(name)


def correction_named(name: str) -> Correction | None:
    """The correction of that name, as `base_named`."""
    _built_in()
    if name not in CORRECTIONS:
        _import_installed(name)
    return CORRECTIONS.get(name)


def registered_names() -> tuple[str, ...]:
    """Names beyond goc_deploy's own: those registered so far, and those of installed packages, which stay unimported."""
    _built_in()
    bases = {name for name, base in BASES.items() if base.registered}
    corrections = {name for name, correction in CORRECTIONS.items() if correction.registered}
    return tuple(
        sorted(bases | corrections | set(installed_names()) - BASES.keys() - CORRECTIONS.keys())
    )


def installed_names() -> tuple[str, ...]:
    """Names that installed packages have under the entry point group; none of the packages is imported."""
    return tuple(sorted({entry.name for entry in _installed()}))


def installed_policies() -> str:
    """`installed_names` as the end of a sentence for help texts, "" where there are none."""
    names = installed_names()
    return f"; from installed packages {', '.join(names)}" if names else ""


def place_of(function: Callable[..., object]) -> str:
    """Module and name of a function, for messages."""
    return f"{function.__module__}.{getattr(function, '__qualname__', type(function).__qualname__)}"


def _built_in() -> None:
    """Have goc_deploy's own names in the tables. ``import goc_deploy`` must not: they need NumPy."""
    import goc_deploy.policies.resolve  # noqa: F401


def _check(
    name: str,
    options: tuple[str, ...],
    function: Callable[..., object],
    registered: Callable[..., object] | None,
) -> None:
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{place_of(function)}: the name {name!r} must be 1 to 32 lower-case letters, digits or underscores and start with a letter"
        )
    for option in options:
        if not _OPTION.fullmatch(option):
            raise UsageError(
                f"{place_of(function)}: the option {option!r} must be 1 to 32 lower-case letters or underscores and start with a letter"
            )
    # The same function again is a cell of a notebook that ran twice, or a module that was reloaded.
    if registered is not None and place_of(registered) != place_of(function):
        raise UsageError(
            f"{place_of(function)}: the name {name!r} is taken by {place_of(registered)}; choose another name"
        )


def _guarded(function: Callable[..., Any]) -> Callable[..., Schedule]:
    """A registered function whose mistakes are errors of ours with its place, and whose schedule has plain floats."""

    @wraps(function)
    def guarded(*arguments: Any) -> Schedule:
        place = place_of(function)
        try:
            found = function(*arguments)
        except GocError:
            raise
        except Exception as cause:
            raise UsageError(f"{place} raised {type(cause).__name__}: {cause}") from cause
        if not isinstance(found, Schedule):
            raise UsageError(
                f"{place} returned a {type(found).__name__}, it must return a goc_deploy.Schedule"
            )
        return _with_plain_rows(found, place)

    return guarded


def _with_plain_rows(schedule: Schedule, place: str) -> Schedule:
    """The schedule with tuples of floats, where it may have lists and NumPy's numbers."""
    try:
        rows = tuple(
            tuple(tuple(float(c) for c in row) for row in step) for step in schedule.coefficients
        )
    except (TypeError, ValueError) as cause:
        raise UsageError(
            f"{place}: coefficients must be numbers, [steps][units][history entries]: {cause}"
        ) from cause
    for step, units in enumerate(rows):
        if len(units) != schedule.units:
            raise UsageError(
                f"{place}: step {step} has {len(units)} units, the schedule says {schedule.units}"
            )
    return replace(schedule, coefficients=rows)


def _installed() -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=ENTRY_POINTS))


def _import_installed(name: str) -> None:
    found = [entry for entry in _installed() if entry.name == name]
    packages = sorted({entry.dist.name if entry.dist else entry.value for entry in found})
    if len(packages) > 1:
        raise EnvironmentUnsupportedError(
            f"the policy {name!r} is in the packages {' and '.join(packages)}; uninstall all but one"
        )
    for entry in found:
        try:
            entry.load()
        except Exception as cause:
            raise EnvironmentUnsupportedError(
                f"the policy {name!r} of the package {packages[0]} ({entry.value}) cannot be imported: {type(cause).__name__}: {cause}; "
                "repair or uninstall the package"
            ) from cause
        if name not in BASES and name not in CORRECTIONS:
            raise EnvironmentUnsupportedError(
                f"the entry point {name!r} of the package {packages[0]} ({entry.value}) registers no policy or correction "
                f"of that name; name it as its @register_policy or @register_correction does"
            )
