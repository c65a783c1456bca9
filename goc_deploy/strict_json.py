"""JSON forms of schedules and plans, and strict reading of JSON that nobody vouches for."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from goc_deploy.errors import GocError

MAX_JSON_BYTES = 64 * 2**20
MAX_DIGITS = 20  # of a whole number, which therefore fits a float


def bytes_from_file(path: Path, where: str, error: type[GocError]) -> bytes:
    """The content of a regular file of at most ``MAX_JSON_BYTES``.

    Raises:
        error: missing, unreadable, larger, or a device or pipe, which might never end.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise error(f"{where} cannot be read: it is not a regular file")
        if status.st_size > MAX_JSON_BYTES:
            raise error(
                f"{where} has {status.st_size} bytes, more than {MAX_JSON_BYTES} are not read"
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
    """Read one JSON object, refusing what ``json`` lets through: duplicate keys, NaN, endless nesting.

    Args:
        text: UTF-8.
        where: the file, for messages.
        error: what is raised.
        constants: numbers that are no JSON and are taken all the same, such as ``-Infinity``, by name.

    Raises:
        error: saying where and why.
    """
    if len(text) > MAX_JSON_BYTES:
        raise error(f"{where} has {len(text)} bytes, more than {MAX_JSON_BYTES} are not read")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key stands twice")
        return found

    def known(constant: str) -> float:
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

    hooks: dict[str, Any] = {"parse_constant": known, "parse_float": finite, "parse_int": bounded}
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique, **hooks)
    except (ValueError, RecursionError) as cause:
        reason = "it is nested too deep" if isinstance(cause, RecursionError) else str(cause)
        raise error(f"{where} is not valid JSON: {reason}") from cause
    if not isinstance(value, dict):
        raise error(f"{where} must hold a JSON object")
    return value


def check_format(
    found: dict[str, Any],
    name: str,
    version: int,
    where: str,
    error: type[GocError],
    oldest: int | None = None,
) -> None:
    """Check the ``format`` and ``version`` fields; ``oldest`` is the first version that is read, by default ``version``.

    Raises:
        error: another format, or a version that this release does not read.
    """
    if found.get("format") != name:
        raise error(f"{where} is not a {name} file (its format is {found.get('format')!r})")
    if not isinstance(found.get("version"), int) or found["version"] > version:
        raise error(
            f"{where} has format version {found.get('version')!r}, this goc_deploy reads up to {version}; update goc_deploy"
        )
    if found["version"] < (version if oldest is None else oldest):
        raise error(
            f"{where} has format version {found['version']}, this goc_deploy reads {version}; export again"
        )


def build(make: Callable[[], Any], where: str, error: type[GocError]) -> Any:
    """Call ``make`` and turn what malformed data raises into one error of ours."""
    try:
        return make()
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as cause:
        raise error(
            f"{where} does not have the expected form: {type(cause).__name__} {cause}"
        ) from cause


def dump_json(value: dict[str, Any], *, indent: int | None = 1) -> str:
    """JSON whose bytes depend on the values only."""
    return json.dumps(value, indent=indent, allow_nan=False) + "\n"
