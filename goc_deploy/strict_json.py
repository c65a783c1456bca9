"""Strict reading of JSON files, and the check of their values against types."""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Iterable, Mapping, Sized
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import msgspec

from goc_deploy.errors import GocError

MAX_JSON_BYTES = 64 * 2**20
MAX_DIGITS = 20  # digits of a whole number, which therefore fits a float
_MISSING = re.compile("Object missing required field `(.+)`")
_STEP = re.compile(r"\.(\w+)|\[(\d+)\]")  # one step of a path such as $.plans[0].name


def bytes_from_file(path: Path, where: str, error: type[GocError]) -> bytes:
    """Read a regular file of at most ``MAX_JSON_BYTES``.

    Raises:
        error: the file is missing, unreadable, larger, or a device or pipe, which might never end.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise error(f"{where} cannot be read: it is not a regular file")
        if status.st_size > MAX_JSON_BYTES:
            raise error(
                f"{where} has {status.st_size} bytes; at most {MAX_JSON_BYTES} are accepted"
            )
        with open(path, "rb") as file:
            return file.read(MAX_JSON_BYTES)
    except (OSError, ValueError) as cause:  # ValueError: a name that no file can have
        raise error(
            f"{where} cannot be read: {getattr(cause, 'strerror', None) or cause}"
        ) from cause


def parse_json(
    text: bytes, where: str, error: type[GocError], constants: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """Parse one JSON object; duplicate keys, NaN, huge numbers and deep nesting are errors.

    Args:
        text: UTF-8.
        where: name of the file for messages.
        error: class of the errors.
        constants: values of names that are accepted although they are not JSON, such as
            ``-Infinity``.

    Raises:
        error: with the file and the reason.
    """
    if len(text) > MAX_JSON_BYTES:
        raise error(f"{where} has {len(text)} bytes; at most {MAX_JSON_BYTES} are accepted")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) != len(pairs):
            names = [name for name, _ in pairs]
            duplicate = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"duplicate key {duplicate!r:.60}")
        return fields

    def allowed(constant: str) -> float:
        if constant not in (constants or {}):
            raise ValueError(f"{constant} is not allowed")
        return (constants or {})[constant]

    def finite(number: str) -> float:
        if math.isinf(float(number)):
            raise ValueError(f"{number:.20} is out of range")
        return float(number)

    def bounded(number: str) -> int:
        if len(number) > MAX_DIGITS:
            raise ValueError(f"{number:.20}... is out of range")
        return int(number)

    hooks: dict[str, Any] = {"parse_constant": allowed, "parse_float": finite, "parse_int": bounded}
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique, **hooks)
    except (ValueError, RecursionError) as cause:
        reason = "it is nested too deep" if isinstance(cause, RecursionError) else str(cause)
        raise error(f"{where} is not valid JSON: {reason}") from cause
    if not isinstance(value, dict):
        raise error(f"{where} must hold a JSON object")
    return value


def check_format(
    fields: Mapping[str, Any],
    name: str,
    version: int,
    where: str,
    error: type[GocError],
    oldest: int | None = None,
) -> None:
    """Check ``format`` and ``version``.

    Args:
        fields: the fields of the file.
        name: the expected format.
        version: the newest version that this release reads.
        where: name of the file for messages.
        error: class of the errors.
        oldest: the oldest version that this release reads; None is ``version``.

    Raises:
        error: another format, or a version that this release does not read.
    """
    stated = fields.get("version")
    if fields.get("format") != name:
        raise error(f"{where} is not a {name} file (its format is {fields.get('format')!r:.60})")
    if type(stated) is not int or stated > version:
        raise error(
            f"{where} has format version {stated!r:.60}, this goc_deploy reads up to {version}; "
            "update goc_deploy"
        )
    if stated < (version if oldest is None else oldest):
        raise error(
            f"{where} has format version {stated}, this goc_deploy reads {version}; export again"
        )


def convert(value: Any, kind: Any, where: str, error: type[GocError], path: str = "$") -> Any:
    """Convert a JSON value to ``kind``, whose annotations define what each field may be.

    Args:
        value: a result of `parse_json`, or a part of it.
        kind: a dataclass, a ``msgspec.Struct`` or another type that msgspec converts to.
        where: name of the file for messages.
        error: class of the errors.
        path: path of the value in the file.

    Raises:
        error: such as ``plan.json: $.launches[0][1]: expected int >= 0, got -1``.
    """
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as cause:
        reason, _, place = str(cause).partition(" - at `$")
        place = place.removesuffix("`")
        if missing := _MISSING.fullmatch(reason):
            place, text = f"{place}.{missing[1]}", "required field is missing"
        else:
            text = _reason(reason, value, place)
        raise error(f"{where}: {path}{place}: {text}") from cause
    except UnicodeEncodeError as cause:  # from half of a surrogate pair
        raise error(f"{where}: {path}: a field's name is not valid Unicode") from cause


def unknown_field(value: Any, converted: Any, path: str = "$") -> str | None:
    """Return the path of the first field of ``value``, at any depth, that `convert` dropped.

    Args:
        value: a JSON value.
        converted: the result of `convert`; dataclasses drop fields that they do not have.
        path: path of the value in the file.
    """
    if isinstance(value, list):
        parts = [(f"{path}[{i}]", part, converted[i]) for i, part in enumerate(value)]
    elif isinstance(value, dict) and is_dataclass(converted):
        names = converted.__dataclass_fields__
        for name in value:
            if name not in names:
                return f"{path}.{name}"
        parts = [(f"{path}.{name}", part, getattr(converted, name)) for name, part in value.items()]
    else:
        return None
    nested = (unknown_field(part, child, place) for place, part, child in parts)
    return next((place for place in nested if place is not None), None)


def expected(allowed: Iterable[Any], value: Any) -> str:
    """Explain why a value that is not one of ``allowed`` is wrong."""
    return f"expected {' or '.join(map(str, allowed))}, got {value!r:.60}"


def _reason(reason: str, value: Any, place: str) -> str:
    """Reword a reason of msgspec in the style of our messages, with the wrong value."""
    text = reason[:1].lower() + reason[1:].replace("`", "")
    if not text.startswith("expected") or "[...]" in place:
        return text
    for name, index in _STEP.findall(place):
        value = value[name or int(index)]
    if " length " in text and isinstance(value, Sized):
        return f"{text.partition(', got ')[0]}, got {len(value)}"
    return f"{text.partition(', got ')[0]}, got {value!r:.60}"


def dump_json(value: dict[str, Any], *, indent: int | None = 1) -> str:
    """JSON whose bytes depend on the values only."""
    return json.dumps(value, indent=indent, allow_nan=False) + "\n"
