"""Strict reading of JSON, and the message of every kind of wrong value."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Meta, Struct

from goc_deploy import strict_json
from goc_deploy.errors import EngineDirError, ScheduleError
from goc_deploy.strict_json import (
    bytes_from_file,
    check_format,
    convert,
    dump_json,
    parse_json,
    unknown_field,
)


class Launch(Struct, array_like=True, tag="c", forbid_unknown_fields=True):
    unit: Annotated[int, Meta(ge=0)]


@dataclass(frozen=True, slots=True)
class Plan:
    steps: Annotated[int, Meta(ge=1, le=9)]
    names: Annotated[tuple[str, ...], Meta(max_length=2)] = ()
    size: float | None = None
    digest: Annotated[str, Meta(pattern=r"^[0-9a-f]{2}\Z")] = "00"
    predict: dict[str, str] | None = None
    launches: tuple[Launch, ...] = ()

    @property
    def derived(self) -> int:
        """No field of a file."""
        return self.steps


@dataclass(frozen=True, slots=True)
class Directory:
    plans: tuple[Plan, ...]
    provenance: Any = None


@pytest.mark.parametrize("number", ["1e999", "-1e999", "1" * 400, "1" * 5000])
def test_numbers_that_no_float_holds_are_refused(number: str) -> None:
    with pytest.raises(EngineDirError, match=r"x is not valid JSON: .*is out of range"):
        parse_json(f'{{"a": {number}}}'.encode(), "x", EngineDirError)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"a": 1, "b": 2, "a": 1}', "x is not valid JSON: duplicate key 'a'"),
        (b'{"c": [{"a": 1, "a": 2}]}', "x is not valid JSON: duplicate key 'a'"),
        (b'{"a": NaN}', "x is not valid JSON: NaN is not allowed"),
        (b'{"a": -Infinity}', "x is not valid JSON: -Infinity is not allowed"),
        (b"[" * 100_000, "x is not valid JSON: it is nested too deep"),
        (b"[]", "x must hold a JSON object"),
        (b"{", "x is not valid JSON: Expecting property name"),
        (b'{"a": "\xff"}', "x is not valid JSON: 'utf-8' codec"),
    ],
)
def test_what_json_lets_through_is_refused(text: bytes, message: str) -> None:
    with pytest.raises(EngineDirError, match=message):
        parse_json(text, "x", EngineDirError)


def test_texts_and_files_beyond_the_limit_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(strict_json, "MAX_JSON_BYTES", 10)
    (tmp_path / "x").write_bytes(b" " * 11)
    with pytest.raises(EngineDirError, match="x has 11 bytes; at most 10 are accepted"):
        parse_json(b" " * 11, "x", EngineDirError)
    with pytest.raises(EngineDirError, match="x has 11 bytes; at most 10 are accepted"):
        bytes_from_file(tmp_path / "x", "x", EngineDirError)


def test_devices_pipes_and_odd_names_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (Path("/dev/zero"), tmp_path / "pipe", tmp_path, Path("a\0b"), Path("x" * 5000)):
        with pytest.raises(ScheduleError, match="x cannot be read"):
            bytes_from_file(path, "x", ScheduleError)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, r"x is not a f file \(its format is None\)"),
        ({"format": "f"}, "x has format version None, this goc_deploy reads up to 3; update"),
        ({"format": "f", "version": True}, "x has format version True"),
        ({"format": "f", "version": 4}, "x has format version 4, this goc_deploy reads up to 3"),
        ({"format": "f", "version": 1}, "x has format version 1, this goc_deploy reads 3; export"),
    ],
)
def test_other_formats_and_versions_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineDirError, match=message):
        check_format(fields, "f", 3, "x", EngineDirError, oldest=2)
    check_format({"format": "f", "version": 2}, "f", 3, "x", EngineDirError, oldest=2)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"steps": 0}, "$.plans[1].steps: expected int >= 1, got 0"),
        ({"steps": 10**19}, "$.plans[1].steps: expected int <= 9, got 10000000000000000000"),
        ({"steps": "4"}, "$.plans[1].steps: expected int, got '4'"),
        ({"steps": 4.0}, "$.plans[1].steps: expected int, got 4.0"),
        ({"steps": True}, "$.plans[1].steps: expected int, got True"),
        ({}, "$.plans[1].steps: required field is missing"),
        (7, "$.plans[1]: expected object, got 7"),
        ({"steps": 1, "names": "ab"}, "$.plans[1].names: expected array, got 'ab'"),
        ({"steps": 1, "names": ["a", 2]}, "$.plans[1].names[1]: expected str, got 2"),
        (
            {"steps": 1, "names": ["a"] * 3},
            "$.plans[1].names: expected array of length <= 2, got 3",
        ),
        ({"steps": 1, "size": []}, "$.plans[1].size: expected float | null, got []"),
        ({"steps": 1, "size": False}, "$.plans[1].size: expected float | null, got False"),
        (
            {"steps": 1, "digest": "0f\n"},
            r"$.plans[1].digest: expected str matching regex '^[0-9a-f]{2}\\Z', got '0f\n'",
        ),
        ({"steps": 1, "predict": {"a": 1}}, "$.plans[1].predict[...]: expected str, got int"),
        ({"steps": 1, "launches": [["c", -1]]}, "$.plans[1].launches[0][1]: expected int >= 0"),
        ({"steps": 1, "launches": [["d", 1]]}, "$.plans[1].launches[0][0]: invalid value 'd'"),
        (
            {"steps": 1, "launches": [["c"]]},
            "$.plans[1].launches[0]: expected array of at least length 2, got 1",
        ),
        ({"\ud800": 1}, "$: a field's name is not valid Unicode"),
    ],
)
def test_a_wrong_value_is_named_with_its_path(plan: Any, message: str) -> None:
    with pytest.raises(EngineDirError) as caught:
        convert({"plans": [{"steps": 1}, plan]}, Directory, "m.json", EngineDirError)
    assert str(caught.value).startswith(f"m.json: {message}")


def test_a_part_of_a_file_is_named_by_the_path_that_is_given() -> None:
    with pytest.raises(ScheduleError) as caught:
        convert([1, "a"], tuple[float, ...], "s.json", ScheduleError, "$.predictors.R")
    assert str(caught.value) == "s.json: $.predictors.R[1]: expected float, got 'a'"


@pytest.mark.parametrize(
    ("given", "path"),
    [
        ({"plans": [{"steps": 1}], "provenance": {"any": [{"thing": 1}]}}, None),
        ({"plans": [], "more": 1}, "$.more"),
        ({"plans": [{"steps": 1}, {"steps": 1, "stepz": 2}]}, "$.plans[1].stepz"),
        ({"plans": [{"steps": 1, "derived": 2}]}, "$.plans[0].derived"),
        ({"plans": [{"steps": 1, "predict": {"a": "b"}}]}, None),
    ],
)
def test_fields_that_no_dataclass_has_are_found(given: Any, path: str | None) -> None:
    assert unknown_field(given, convert(given, Directory, "x", EngineDirError)) == path


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**18), 10**18)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), VALUES, max_size=4))
def test_reading_what_was_written_is_the_identity(value: dict[str, Any]) -> None:
    assert parse_json(dump_json(value).encode(), "x", EngineDirError) == value


@given(st.dictionaries(st.sampled_from(["plans", "provenance"]), VALUES))
def test_any_json_value_is_converted_or_refused(value: dict[str, Any]) -> None:
    with contextlib.suppress(EngineDirError):
        convert(value, Directory, "x", EngineDirError)
