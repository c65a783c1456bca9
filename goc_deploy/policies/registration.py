"""Policies and corrections of other packages: how they are registered and imported.

An installed package names its own under the entry point group ``goc_deploy.policies``. Their names
are read from the package's metadata; its code is imported if a SPEC uses such a name, and at no
other time.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import make_dataclass, replace
from functools import wraps
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from goc_deploy.errors import EnvironmentUnsupportedError, GocError, UsageError
from goc_deploy.policies.context import PolicyContext
from goc_deploy.policies.options import (
    argument,
    check_option_name,
    fields_of,
    option,
    option_names,
)
from goc_deploy.policies.tables import BASES, CORRECTIONS, Base, Correction
from goc_deploy.schedule import Schedule

ENTRY_POINTS = "goc_deploy.policies"
_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")

MakeT = TypeVar("MakeT", bound=Callable[[Any, PolicyContext], Schedule])
CorrectT = TypeVar("CorrectT", bound=Callable[[Schedule, Any, PolicyContext], Schedule])
Options = tuple[str, ...] | type


def register_policy(
    name: str, *, options: Options = (), chooses_steps: bool = False
) -> Callable[[MakeT], MakeT]:
    """Decorator: a SPEC may have ``name[:ARGUMENT]`` as its base.

    The function takes the SPEC's argument and a `goc_deploy.policies.context.PolicyContext`, and
    returns the `goc_deploy.Schedule` of ``context.steps`` steps. Its ``coefficients`` are [T][U]
    tuples over the history, newest first: ``()`` computes a unit and ``(1.0,)`` reuses it.

    Args:
        name: lower-case letters, digits and underscores, at most 32.
        options: names of the options ``,OPTION=VALUE`` of a SPEC that the function reads in
            ``context.options``; then the argument is a string, "" if there is none. Or a frozen
            dataclass of arguments and options, see `goc_deploy.policies.options`; then the function
            takes an instance in place of the argument.
        chooses_steps: the number of steps is that of the schedule, not ``context.steps``.

    Raises:
        UsageError: the name is taken by another function, a name has another form, or the dataclass
            does not fit.
    """

    def register(make: MakeT) -> MakeT:
        _check(name, make, BASES[name].make if name in BASES else None)
        dataclass_ = _options_dataclass(name, options, make)
        BASES[name] = Base(
            _guarded(make, options), dataclass_, chooses_steps=chooses_steps, registered=True
        )
        return make

    return register


def register_correction(name: str, *, options: Options = ()) -> Callable[[CorrectT], CorrectT]:
    """Decorator: a SPEC may have ``+name[:ARGUMENT]`` as its correction.

    The function takes the schedule of the base, the argument and a
    `goc_deploy.policies.context.PolicyContext`, and returns the schedule with other coefficients
    where the base has ``(1.0,)``. With ``short_history="reuse"`` in the schedule, an evaluation
    that reads more than is stored reuses plainly.

    Args:
        name: lower-case letters, digits and underscores, at most 32.
        options: as for `register_policy`. Without a field ``both_branches`` in the dataclass, that
            option exists for every correction and is honored for it.

    Raises:
        UsageError: the name is taken by another function, a name has another form, or the dataclass
            does not fit.
    """

    def register(apply: CorrectT) -> CorrectT:
        _check(name, apply, CORRECTIONS[name].apply if name in CORRECTIONS else None)
        dataclass_ = _options_dataclass(name, options, apply)
        CORRECTIONS[name] = Correction(
            _guarded(apply, options),
            dataclass_,
            restrictable="both_branches" not in option_names(dataclass_),
            registered=True,
        )
        return apply

    return register


def base_named(name: str) -> Base[Any] | None:
    """The base policy of that name, or None; an installed package that has it is imported.

    Raises:
        EnvironmentUnsupportedError: two packages have one of that name, or importing its package
            fails.
    """
    if name not in BASES:
        _import_installed(name)
    return BASES.get(name)


def correction_named(name: str) -> Correction[Any] | None:
    """The correction of that name, as `base_named`."""
    if name not in CORRECTIONS:
        _import_installed(name)
    return CORRECTIONS.get(name)


def registered_names() -> tuple[str, ...]:
    """Names registered so far, and those of installed packages, which are not imported."""
    bases = {name for name, base in BASES.items() if base.registered}
    corrections = {name for name, correction in CORRECTIONS.items() if correction.registered}
    return tuple(
        sorted(bases | corrections | set(installed_names()) - BASES.keys() - CORRECTIONS.keys())
    )


def installed_names() -> tuple[str, ...]:
    """Names of the entry point group; none of the packages is imported."""
    return tuple(sorted({entry.name for entry in _installed()}))


def installed_policies() -> str:
    """`installed_names` as the end of a sentence for help texts, "" if there are none."""
    names = installed_names()
    return f"; from installed packages {', '.join(names)}" if names else ""


def place_of(function: Callable[..., object]) -> str:
    """Module and name of a function, for messages."""
    return f"{function.__module__}.{getattr(function, '__qualname__', type(function).__qualname__)}"


def _check(
    name: str, function: Callable[..., object], registered: Callable[..., object] | None
) -> None:
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{place_of(function)}: the name {name!r} must be 1 to 32 lower-case letters, "
            "digits or underscores and start with a letter"
        )
    # The same function again is a cell of a notebook that ran twice, or a module that was reloaded.
    if registered is not None and place_of(registered) != place_of(function):
        raise UsageError(
            f"{place_of(function)}: the name {name!r} is taken by {place_of(registered)}; choose "
            "another name"
        )


def _options_dataclass(name: str, options: Options, function: Callable[..., object]) -> type:
    """The dataclass once it is checked, or one of strings: an argument and the named options."""
    try:
        if isinstance(options, type):
            fields_of(options)
            return options
        own: list[tuple[str, Any, Any]] = [("argument", str, argument("", default=""))]
        own += [
            (f"option_{one}", str, option("", default="", name=check_option_name(one)))
            for one in options
        ]
    except UsageError as cause:
        raise UsageError(f"{place_of(function)}: {cause}") from cause
    return make_dataclass(f"{name}_options", own, frozen=True)


def _guarded(function: Callable[..., Any], options: Options) -> Callable[..., Schedule]:
    """A registered function whose mistakes are errors of ours with its place.

    Its schedule has plain floats. It takes an options dataclass before the context; ``function``
    does, or takes the argument as text.
    """

    @wraps(function)
    def guarded(*arguments: Any) -> Schedule:
        place = place_of(function)
        *schedule, own, context = arguments
        try:
            made = function(*schedule, own if isinstance(options, type) else own.argument, context)
        except GocError:
            raise
        except Exception as cause:
            raise UsageError(f"{place} raised {type(cause).__name__}: {cause}") from cause
        if not isinstance(made, Schedule):
            raise UsageError(
                f"{place} returned a {type(made).__name__}, it must return a goc_deploy.Schedule"
            )
        return _with_plain_rows(made, place)

    return guarded


def _with_plain_rows(schedule: Schedule, place: str) -> Schedule:
    """The schedule with tuples of floats, in which it may have lists and NumPy's numbers."""
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
    entries = [entry for entry in _installed() if entry.name == name]
    packages = sorted({entry.dist.name if entry.dist else entry.value for entry in entries})
    if len(packages) > 1:
        raise EnvironmentUnsupportedError(
            f"the policy {name!r} is in the packages {' and '.join(packages)}; "
            "uninstall all but one"
        )
    for entry in entries:
        try:
            entry.load()
        except Exception as cause:
            raise EnvironmentUnsupportedError(
                f"the policy {name!r} of the package {packages[0]} ({entry.value}) cannot be "
                f"imported: {type(cause).__name__}: {cause}; repair or uninstall the package"
            ) from cause
        if name not in BASES and name not in CORRECTIONS:
            raise EnvironmentUnsupportedError(
                f"the entry point {name!r} of the package {packages[0]} ({entry.value}) registers "
                "no policy or correction of that name; name it as its @register_policy or "
                "@register_correction does"
            )
