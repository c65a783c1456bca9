"""Options dataclasses: what a SPEC fills, what is refused, and what may be declared."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, fields
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from goc_deploy.errors import UsageError
from goc_deploy.policies.bases import ForaOptions, RouterOptions
from goc_deploy.policies.fit import FitOptions
from goc_deploy.policies.gradient import GradientStepsOptions
from goc_deploy.policies.options import (
    Milliseconds,
    NoOptions,
    argument,
    fields_of,
    filled,
    option,
    option_names,
)
from goc_deploy.policies.resolve import CommonOptions, RestrictionOptions
from goc_deploy.policies.tables import BASES, CORRECTIONS
from goc_deploy.schedule import HISTORY_KINDS

ALL = {row.options for row in (*BASES.values(), *CORRECTIONS.values())}
ALL |= {CommonOptions, RestrictionOptions}


@dataclass(frozen=True, slots=True)
class Example:
    """One field of every type."""

    what: float | Path = argument("What.", low=0, suffix=".json")
    ratio: float = argument("Ratio.", separator="@", default=1.0)
    kind: Literal["slow", "fast"] = option("Kind.", default="slow")
    level: float | Literal["auto"] = option("Level.", default="auto")
    budget: int | Milliseconds = option("Budget.", default=3, low=1, high=9)
    share: Fraction = option("Share.", default=Fraction(1), above=0)
    whole: bool = option("Whole.", default=False)
    text: str | None = option("Text.", default=None, name="label")


def test_a_spec_fills_every_field_with_a_value_of_its_type() -> None:
    pairs = {
        "kind": "fast",
        "level": "0.5",
        "budget": "2.5ms",
        "share": "0.55",
        "whole": "",
        "label": "x",
        "other": "1",
    }
    read = filled(Example, "example", "0.25@3", pairs)
    expected = Example(0.25, 3.0, "fast", 0.5, Milliseconds(2.5), Fraction(11, 20), True, "x")
    assert read == expected
    assert isinstance(read.budget, Milliseconds)
    assert filled(Example, "example", "a.json", {}) == Example(Path("a.json"))
    assert filled(Example, "example", "7", {"budget": "9", "level": "auto"}).budget == 9
    steps = filled(GradientStepsOptions, "steps", "3,5:0.8", {})
    assert steps == GradientStepsOptions((3, 5), 0.8)


@pytest.mark.parametrize(
    ("written", "pairs", "message"),
    [
        (
            "",
            {},
            r"^what must be a number at least 0 or the path of a file that ends in .json, got ''$",
        ),
        ("-1", {}, "^what must be .*, got '-1'$"),
        ("a.txt", {}, "^what must be .*, got 'a.txt'$"),
        ("1", {"kind": "middle"}, "^option kind must be slow or fast, got 'middle'$"),
        ("1", {"budget": "10"}, "^option budget must be a whole number within 1..9 or .*'10'$"),
        ("1", {"budget": "0ms"}, "^option budget must be .*, got '0ms'$"),
        ("1", {"share": "0"}, "^option share must be a number above 0, got '0'$"),
        ("1", {"share": "1/2"}, "^option share must be"),
        ("1", {"whole": "1"}, "^option whole must be written without a value, got '1'$"),
    ],
)
def test_a_value_that_does_not_fit_is_refused_by_name_and_range(
    written: str, pairs: dict[str, str], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        filled(Example, "example", written, pairs)


def test_an_at_in_a_path_is_a_threshold_only_before_a_number() -> None:
    assert filled(RouterOptions, "l2c", "me@home/a.pt", {}).router == Path("me@home/a.pt")
    both = filled(RouterOptions, "l2c", "me@home/a.pt@0.2", {})
    assert both == RouterOptions(Path("me@home/a.pt"), 0.2)
    with pytest.raises(UsageError, match="'none' takes no argument, got '1'"):
        filled(NoOptions, "none", "1", {})


@given(st.text(max_size=12))
def test_any_text_is_a_value_or_a_usage_error(text: str) -> None:
    for options in ALL:
        for pairs in ({}, dict.fromkeys(option_names(options), text)):
            with suppress(UsageError):
                filled(options, "policy", text, pairs)


@pytest.mark.parametrize("options", sorted(ALL, key=lambda one: one.__qualname__))
def test_every_option_has_a_sentence_and_a_default_that_a_spec_could_write(options: type) -> None:
    assert len(fields_of(options)) == len(fields(options))
    for one in fields_of(options):
        assert one.help[0].isupper()
        assert one.help.endswith(".")
        if not one.required and one.default is not None and one.types != (bool,):
            assert one.value(str(one.default)) == one.default


def test_closed_sets_are_those_of_the_schedule() -> None:
    history = get_type_hints(CommonOptions)["history"]
    assert get_args(get_args(history)[0]) == HISTORY_KINDS
    assert option_names(FitOptions) == ("fit", "ridge")
    assert filled(ForaOptions, "fora", "2", {}) == ForaOptions(2)


class NoDataclass:
    eta: float = 1.0


@dataclass(frozen=True)
class Unmarked:
    eta: float = 1.0


@dataclass(frozen=True)
class OddType:
    eta: complex = option("Eta.", default=1j)


@dataclass(frozen=True)
class OddName:
    Eta: float = option("Eta.", default=1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (NoDataclass, "NoDataclass'> must be a dataclass"),
        (Unmarked, r"field 'eta' of Unmarked must be made by argument\(\) or option\(\)"),
        (OddType, "field 'eta' of OddType has a type that no SPEC can write: <class 'complex'>"),
        (OddName, "the option 'Eta' must be 1 to 32 lower-case letters"),
    ],
)
def test_a_dataclass_that_no_spec_can_fill_is_refused(options: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        fields_of(options)
