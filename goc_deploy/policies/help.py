"""Help texts about SPECs, made of the tables of policies and their options."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import MISSING
from typing import Any, Literal, get_args, get_origin

from goc_deploy.policies.grammar import FORM
from goc_deploy.policies.head import HEAD_HELP, HeadOptions
from goc_deploy.policies.options import OptionField, arguments_of, fields_of
from goc_deploy.policies.registration import installed_names
from goc_deploy.policies.resolve import CommonOptions, RestrictionOptions
from goc_deploy.policies.tables import (
    BASE_NAMES,
    BASES,
    CORRECTION_NAMES,
    CORRECTIONS,
    Base,
    Correction,
)

WIDTH = 76  # of a line of help; click indents by two
INDENT = 26


def form_of(name: str, options: type[Any]) -> str:
    """A policy and its arguments as a SPEC writes them, such as ``fora:INTERVAL[@FRACTION]``."""
    text = ""
    for one in reversed(arguments_of(options)):
        text = f"{one.separator}{_form(one)}{text}"
        text = text if one.required else f"[{text}]"
    return name + text


def grammar() -> str:
    """The forms of goc_deploy's own bases and corrections, as the beginning of a sentence."""
    bases = [form_of(name, BASES[name].options) for name in BASE_NAMES]
    corrections = [f"+{form_of(name, CORRECTIONS[name].options)}" for name in CORRECTION_NAMES]
    return (
        f"{', '.join(bases[:-1])} or {bases[-1]}, then {', '.join(corrections[:-1])} or "
        f"{corrections[-1]}, then +{form_of('head', HeadOptions)}, then options such as "
        ",history=computed"
    )


def calibrated() -> str:
    """Names of the parts of a SPEC that learn from images, as a list in a sentence."""
    names = [name for name in CORRECTION_NAMES if CORRECTIONS[name].calibrates]
    names += [name for name in BASE_NAMES if BASES[name].calibrates]
    return ", ".join([*names, "head"])


def policy_help() -> str:
    r"""Every policy and option with its sentence and default, for click (``\b`` keeps lines)."""
    bases, corrections, common = ["\b", "BASE, what is computed:"], ["\b"], ["\b"]
    heads = ["\b", "HEAD, what is added to the latents:"]
    heads += _part("+", "head", HeadOptions, f"{HEAD_HELP} Learns from images.")
    for name in BASE_NAMES:
        bases += _policy("", name, BASES[name])
    corrections.append("CORRECTION, how the rest is predicted:")
    for name in CORRECTION_NAMES:
        corrections += _policy("+", name, CORRECTIONS[name])
    common.append("OPTION, besides those above:")
    for one in (*fields_of(CommonOptions), *fields_of(RestrictionOptions)):
        common += _option(one)
    names = ", ".join(installed_names())
    installed = [f"More policies are from installed packages: {names}."] if names else []
    blocks = ("\n".join(lines) for lines in (bases, corrections, heads, common))
    return "\n\n".join((f"SPEC is {FORM}", *blocks, *installed))


def _policy(plus: str, name: str, row: Base[Any] | Correction[Any]) -> Iterator[str]:
    """The lines of a base or correction: its form and sentence, then its arguments and options."""
    learns = " Learns from images." if row.calibrates else ""
    yield from _part(plus, name, row.options, f"{row.help}{learns}")


def _part(plus: str, name: str, options: type[Any], text: str) -> Iterator[str]:
    """The lines of a part of a SPEC: its form and sentences, then its arguments and options."""
    yield from _entry(plus + form_of(name, options), text, 0)
    for one in fields_of(options):
        yield from _option(one)


def _option(one: OptionField) -> Iterator[str]:
    limited = any(bound is not None for bound in (one.low, one.high, one.above))
    expected = f" {one.expectation[0].upper()}{one.expectation[1:]}." if limited else ""
    shown = "" if one.default in (MISSING, None, False) else f"  [default: {one.default}]"
    yield from _entry(_form(one), f"{one.help}{expected}{shown}", 4)


def _form(one: OptionField) -> str:
    """A field as a SPEC writes it: ``FRACTION``, ``,phase=first|last`` or ``,per_unit``."""
    choices = one.types[0] if len(one.types) == 1 else None
    words = "|".join(get_args(choices)) if get_origin(choices) is Literal else one.name.upper()
    if one.separator:
        return one.form or words
    return f",{one.name}" + ("" if one.types == (bool,) else f"={one.form or words}")


def _entry(form: str, text: str, indent: int) -> Iterator[str]:
    """A form and what it means beside it, below each other if the form is long."""
    first = f"{' ' * indent}{form}"
    lines = textwrap.wrap(text, WIDTH - INDENT)
    if len(first) > INDENT - 2:
        yield first
    else:
        yield f"{first:{INDENT}}{lines.pop(0)}"
    yield from (f"{' ' * INDENT}{line}" for line in lines)
