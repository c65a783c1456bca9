"""Options of policies as data: a frozen dataclass whose fields know type, default, range and help.

The SPEC ``fora:2@0.5,phase=last`` fills, once, an instance of

    @dataclass(frozen=True, slots=True)
    class ForaOptions:
        interval: int = argument("Every INTERVAL-th step is computed.", low=1, high=1000)
        fraction: Fraction = argument("...", default=Fraction(1), separator="@", above=0, high=1)
        phase: Literal["first", "last"] = option("...", default="first")

The grammar, the error messages and the help texts derive from the same fields. Types of a field are
``int``, ``float``, ``Fraction`` (exact), `Milliseconds`, ``bool`` (a flag, options only), ``str``,
``Path``, ``tuple[int, ...]``, ``tuple[float, float]`` (a range), ``Literal`` of strings, and unions
of these; ``None`` is a default only.
"""

from __future__ import annotations

import re
import types
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from goc_deploy.errors import UsageError

OptionsT = TypeVar("OptionsT")

MAGNITUDE = 1e3  # numbers of a SPEC are below it
_NAME = re.compile(r"[a-z][a-z_]{0,31}")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?")
_WHOLE = re.compile(r"[0-9]{1,18}")
_KEY = "goc_deploy.option"


class Milliseconds(float):
    """A number that is written with ``ms`` after it."""

    __slots__ = ()


_TYPES = (bool, int, float, Fraction, Milliseconds, str, Path, tuple[int, ...], tuple[float, float])


@dataclass(frozen=True, slots=True)
class OptionField:
    """A field of an options dataclass.

    Attributes:
        help: a sentence.
        default: what a SPEC without it has; ``dataclasses.MISSING`` if a SPEC must have it.
        separator: what precedes an argument in a SPEC; "" for an option.
        name: as a SPEC writes it, by default as the dataclass does.
        form: how help texts write its value, by default its choices or its name in capitals.
        low: least number; like the next two, not of milliseconds, which are any positive number.
        high: largest number.
        above: a number that is too small.
        suffix: how a path ends.
        attribute: its name in the dataclass.
        types: what its value may be, tried in this order.
    """

    help: str
    default: Any = None
    separator: str = ""
    name: str = ""
    form: str = ""
    low: float | None = None
    high: float | None = None
    above: float | None = None
    suffix: str = ""
    attribute: str = ""
    types: tuple[Any, ...] = ()

    @property
    def required(self) -> bool:
        """Whether a SPEC must have it."""
        return self.default is MISSING

    @property
    def takes_path(self) -> bool:
        """Whether its value may be the path of a file."""
        return Path in self.types

    @property
    def expectation(self) -> str:
        """What its value must be, as the end of a sentence."""
        return " or ".join(_expectation(kind, self) for kind in self.types)

    def read(self, text: str) -> Any:
        """The value that a SPEC writes as ``text``, or None if it does not fit."""
        values = (_converted(kind, text, self) for kind in self.types)
        return next((value for value in values if value is not None), None)

    def value(self, text: str) -> Any:
        """As `read`.

        Raises:
            UsageError: it is none of the types, or out of range.
        """
        value = self.read(text)
        if value is None:
            what = self.name if self.separator else f"option {self.name}"
            raise UsageError(f"{what} must be {self.expectation}, got {text!r:.60}")
        return value


def argument(help: str, *, default: Any = MISSING, separator: str = ":", **more: Any) -> Any:
    """A field that follows a policy's name: ``name:FIRST``, then ``SEPARATOR`` and the next.

    Args:
        help: a sentence for help texts.
        default: what a SPEC without it has; without a default, a SPEC must have it.
        separator: the character before it.
        more: further attributes of `OptionField`, such as ``low`` and ``high``.
    """
    return field(default=default, metadata={_KEY: OptionField(help, separator=separator, **more)})


def option(help: str, *, default: Any, **more: Any) -> Any:
    """A field ``,NAME=VALUE`` of a SPEC, or ``,NAME`` for a ``bool``; see `argument`."""
    return field(default=default, metadata={_KEY: OptionField(help, **more)})


@dataclass(frozen=True, slots=True)
class NoOptions:
    """Neither an argument nor options."""


def fields_of(options: type[Any]) -> tuple[OptionField, ...]:
    """The fields of an options dataclass: arguments in their order, then options.

    Raises:
        UsageError: it is no dataclass, or a field is not made by `argument` or `option`, has a type
            that no SPEC can write, or a name that a SPEC cannot have.
    """
    if not is_dataclass(options):
        raise UsageError(f"{options!r} must be a dataclass")
    try:
        hints = get_type_hints(options)
    except NameError as cause:
        raise UsageError(
            f"{options.__qualname__}: {cause}; define its types in a module"
        ) from cause
    made = []
    for one in fields(options):
        where, hint = f"field {one.name!r} of {options.__qualname__}", hints[one.name]
        if _KEY not in one.metadata:
            raise UsageError(f"{where} must be made by argument() or option()")
        union = get_origin(hint) in (Union, types.UnionType)
        kinds = tuple(k for k in (get_args(hint) if union else (hint,)) if k is not type(None))
        for kind in kinds:
            if kind not in _TYPES and get_origin(kind) is not Literal:
                raise UsageError(f"{where} has a type that no SPEC can write: {kind}")
        template: OptionField = one.metadata[_KEY]
        name = check_option_name(template.name or one.name)
        made.append(
            replace(template, name=name, default=one.default, attribute=one.name, types=kinds)
        )
    return tuple(sorted(made, key=lambda one: not one.separator))


def check_option_name(name: str) -> str:
    """Return ``name`` if a SPEC can have an option of that name, else raise UsageError."""
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"the option {name!r} must be 1 to 32 lower-case letters or underscores and start with "
            "a letter"
        )
    return name


def arguments_of(options: type[Any]) -> tuple[OptionField, ...]:
    """The arguments of an options dataclass, in their order."""
    return tuple(one for one in fields_of(options) if one.separator)


def option_names(options: type[Any]) -> tuple[str, ...]:
    """Names of the options of an options dataclass, without the arguments."""
    return tuple(one.name for one in fields_of(options) if not one.separator)


def filled(
    options: type[OptionsT], policy: str, written: str, pairs: Mapping[str, str]
) -> OptionsT:
    """An options dataclass with the values of a SPEC.

    Args:
        options: the dataclass.
        policy: the name of the policy or correction, for messages.
        written: what the SPEC has after the name and its colon, "" if nothing.
        pairs: options of the SPEC by name, those of other dataclasses among them; a flag's value is
            "".

    Raises:
        UsageError: a value is missing, is not of the field's type, or is out of range.
    """
    texts = argument_texts(options, written)
    if written and not texts:
        raise UsageError(f"{policy!r} takes no argument, got {written!r:.60}")
    texts |= {name: pairs[name] for name in option_names(options) if name in pairs}
    return options(
        **{o.attribute: o.value(texts[o.name]) for o in fields_of(options) if o.name in texts}
    )


def argument_texts(options: type[Any], written: str) -> dict[str, str]:
    """The text of each argument that a SPEC has, by name. A missing one is "" if it is required.

    What follows an ``@`` in a path is the next argument only if it is a number.
    """
    if not arguments_of(options):
        return {}
    first, *others = arguments_of(options)
    texts, rest = {}, written
    for one in reversed(others):
        head, separator, tail = rest.rpartition(one.separator)
        if separator and (not first.takes_path or _NUMBER.fullmatch(tail)):
            rest, texts[one.name] = head, tail
    return texts | ({first.name: rest} if rest or first.required else {})


def _converted(kind: Any, text: str, one: OptionField) -> Any:
    """The value of one type, or None if the text is none of that type or out of range."""
    if get_origin(kind) is Literal:
        return text if text in get_args(kind) else None
    if kind is bool:
        return None if text else True
    if kind is str:
        return text
    if kind is Path:
        return Path(text) if text and text.endswith(one.suffix) else None
    if kind == tuple[int, ...]:
        parts = text.split(",")
        return tuple(map(int, parts)) if all(map(_WHOLE.fullmatch, parts)) else None
    if kind is Milliseconds:
        number = text.removesuffix("ms")
        fits = number != text and _NUMBER.fullmatch(number) and 0 < float(number) < MAGNITUDE
        return Milliseconds(number) if fits else None
    if kind == tuple[float, float]:
        ends = [_converted(float, end, one) for end in text.split("..", 1)]
        fits = len(ends) == 2 and None not in ends and ends[0] < ends[1]
        return tuple(ends) if fits else None
    if not (_WHOLE if kind is int else _NUMBER).fullmatch(text):
        return None
    value = kind(text)
    fits = (
        (one.low is None or value >= one.low)
        and (one.above is None or value > one.above)
        and (one.high is None or value <= one.high)
        and (kind is int or abs(value) < MAGNITUDE)
    )
    return value if fits else None


def _expectation(kind: Any, one: OptionField) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(get_args(kind))
    if kind == tuple[float, float]:
        return f"LO..HI, each {_expectation(float, one)}, LO below HI"
    if kind in (int, float, Fraction):
        number = "a whole number" if kind is int else "a number"
        if one.low is not None and one.high is not None:
            return f"{number} within {one.low:g}..{one.high:g}"
        bounds = (("above", one.above), ("at least", one.low), ("at most", one.high))
        limits = " and ".join(f"{word} {bound:g}" for word, bound in bounds if bound is not None)
        return f"{number} {limits or f'below {MAGNITUDE:g} in magnitude'}"
    return {
        bool: "written without a value",
        str: "a text",
        Path: f"the path of a file{one.suffix and f' that ends in {one.suffix}'}",
        Milliseconds: f"a number above 0 and below {MAGNITUDE:g} followed by ms",
        tuple[int, ...]: "whole numbers separated by commas",
    }[kind]
