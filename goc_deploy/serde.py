"""JSON forms of schedules and plans, and strict reading of JSON that nobody vouches for."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import asdict
from operator import index
from pathlib import Path
from typing import Any

from goc_deploy.errors import EngineDirError, GocError, ScheduleError
from goc_deploy.plan import SEGMENTS, Collect, Compute, Launch, Plan, Predict, Prediction, Segment
from goc_deploy.samplers import SamplerTable
from goc_deploy.schedule import COMPUTE, MAX_BLOCKS, MAX_STEPS, REUSE, Schedule

SCHEDULE_FORMAT, SCHEDULE_VERSION = "goc_deploy.schedule", 2
OLDEST_SCHEDULE_VERSION = 1  # had no provenance
PLAN_FORMAT, PLAN_VERSION = "goc_deploy.plan", 3
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


def schedule_to_json(schedule: Schedule) -> str:
    """A schedule as hand-editable JSON.

    ``actions`` has a string per step with a word per unit (attn and mlp of block 0, then of block 1, ...): ``C``
    computes, any other word names a row of ``predictors``: coefficients over the history, newest first.
    """
    words: dict[tuple[float, ...], str] = {COMPUTE: "C", REUSE: "R"}
    for step in schedule.coefficients:
        for row in step:
            words.setdefault(row, f"P{len(words) - 1}")
    return dump_json(
        {
            "format": SCHEDULE_FORMAT,
            "version": SCHEDULE_VERSION,
            "policy": schedule.policy,
            "depth": schedule.depth,
            "branches": list(schedule.branches),
            "history": schedule.history,
            "short_history": schedule.short_history,
            "predictors": {word: list(row) for row, word in words.items() if row},
            "actions": [" ".join(words[row] for row in step) for step in schedule.coefficients],
            **({"provenance": dict(schedule.provenance)} if schedule.provenance else {}),
        }
    )


def schedule_from_json(text: bytes, where: str) -> Schedule:
    """Read a schedule.

    Raises:
        ScheduleError: not JSON, another format, an unknown action word, or a wrong number of units.
    """
    found = parse_json(text, where, ScheduleError)
    check_format(
        found, SCHEDULE_FORMAT, SCHEDULE_VERSION, where, ScheduleError, OLDEST_SCHEDULE_VERSION
    )
    schedule: Schedule = build(lambda: _schedule_from_fields(found, where), where, ScheduleError)
    return schedule


def schedule_from_file(path: Path) -> Schedule:
    """Read a schedule file.

    Raises:
        ScheduleError: unreadable, or as `schedule_from_json`.
    """
    return schedule_from_json(
        bytes_from_file(path, f"schedule {path}", ScheduleError), f"schedule {path}"
    )


def _schedule_from_fields(found: dict[str, Any], where: str) -> Schedule:
    depth, branches = found["depth"], tuple(str(branch) for branch in found["branches"])
    if type(depth) is not int or not 1 <= depth <= MAX_BLOCKS or not 1 <= len(branches) <= 3:
        raise ScheduleError(
            f"{where}: depth must be 1 to {MAX_BLOCKS} and there are 1 to 3 branches"
        )
    if found["short_history"] not in ("reuse", "error"):
        raise ScheduleError(f"{where}: short_history must be 'reuse' or 'error'")
    if not 1 <= len(found["actions"]) <= MAX_STEPS:
        raise ScheduleError(f"{where}: there must be 1 to {MAX_STEPS} steps")
    predictors = {
        str(word): _coefficients(row, f"{where}: predictors.{word}")
        for word, row in found["predictors"].items()
    }
    if "C" in predictors or not all(predictors.values()):
        raise ScheduleError(
            f"{where}: a predictor needs at least one coefficient and cannot be named C"
        )
    words = {"C": COMPUTE, **predictors}
    rows = []
    for step, text in enumerate(found["actions"]):
        actions = text.split()
        if len(actions) != depth * len(branches):
            raise ScheduleError(
                f"{where}: step {step} has {len(actions)} actions for {depth * len(branches)} units"
            )
        for unit, word in enumerate(actions):
            if word not in words:
                block, branch = divmod(unit, len(branches))
                raise ScheduleError(
                    f"{where}: step {step}, block {block}, {branches[branch]}: unknown action {word!r}"
                )
        rows.append(tuple(words[word] for word in actions))
    provenance = found.get("provenance", {})
    if not isinstance(provenance, dict):
        raise ScheduleError(f"{where}: provenance must be a JSON object")
    kinds = (found["history"], found["short_history"], str(found["policy"]))
    return Schedule(depth, branches, tuple(rows), *kinds, provenance)


def _coefficients(row: Any, place: str) -> tuple[float, ...]:
    if not isinstance(row, list):
        raise ScheduleError(f"{place} is {row!r}, it must be a list of numbers")
    for position, coefficient in enumerate(row):
        if type(coefficient) not in (int, float):
            raise ScheduleError(f"{place}[{position}] is {coefficient!r}, it must be a number")
    return tuple(float(coefficient) for coefficient in row)


def plan_to_json(plan: Plan) -> str:
    """A plan as JSON.

    Launches are lists: ``["c", unit, slot]`` computes, ``["p", unit, [[slots, coefficients, slot], ...], ahead]``
    predicts, ``["a", ahead]`` adds an accumulator.
    """
    return dump_json(
        {
            "format": PLAN_FORMAT,
            "version": PLAN_VERSION,
            "name": plan.name,
            "segments": plan.segments,
            "slots": plan.slots,
            "sampler": _sampler_to_fields(plan.sampler),
            "launches": [[_launch_to_list(op) for op in step] for step in plan.launches],
        },
        indent=None,
    )


def _sampler_to_fields(table: SamplerTable) -> dict[str, Any]:
    fields = asdict(table)
    if table.start == 1:  # as in files that were written before there was a start
        del fields["start"]
    return fields


def _launch_to_list(op: Launch) -> list[Any]:
    if isinstance(op, Compute):
        return ["c", op.unit, op.store]
    if isinstance(op, Collect):
        return ["a", op.ahead]
    assert not isinstance(op, Segment), "what backends make of a plan is not written"
    return [
        "p",
        op.unit,
        [[list(p.slots), list(p.coefficients), p.store] for p in op.predictions],
        op.ahead,
    ]


def plan_from_json(text: bytes, schedule: Schedule, where: str) -> Plan:
    """Read a plan; ``schedule`` is what it was compiled from.

    Raises:
        EngineDirError: not JSON or another format. `check_plan` says whether it is safe to execute.
    """
    found = parse_json(text, where, EngineDirError)
    check_format(found, PLAN_FORMAT, PLAN_VERSION, where, EngineDirError)

    def make() -> Plan:
        sampler = _sampler_from_fields(found["sampler"])
        launches = tuple(tuple(_launch_from_list(op) for op in step) for step in found["launches"])
        segments = found.get("segments", "none")
        if segments not in SEGMENTS:
            raise ValueError(f"unknown segments {segments!r}")
        return Plan(
            str(found["name"]), sampler, launches, index(found["slots"]), schedule, segments
        )

    plan: Plan = build(make, where, EngineDirError)
    return plan


def _sampler_from_fields(table: dict[str, Any]) -> SamplerTable:
    numbers = {
        key: tuple(float(v) for v in table[key]) for key in ("latent", "model", "noise", "spread")
    }
    return SamplerTable(
        sampler=str(table["sampler"]),
        prediction=str(table["prediction"]),
        timesteps=tuple(t if isinstance(t, int) else float(t) for t in table["timesteps"]),
        estimate=tuple((float(of_x), float(of_m)) for of_x, of_m in table["estimate"]),
        history=tuple(tuple(float(w) for w in row) for row in table["history"]),
        start=float(table.get("start", 1)),
        **numbers,
    )


def _launch_from_list(op: list[Any]) -> Launch:
    if op[0] == "c":
        return Compute(index(op[1]), _slot(op[2]))
    if op[0] == "a":
        return Collect(index(op[1]))
    if op[0] != "p":
        raise ValueError(f"unknown launch {op[0]!r}")
    rows = (
        Prediction(tuple(index(s) for s in p[0]), tuple(float(c) for c in p[1]), _slot(p[2]))
        for p in op[2]
    )
    return Predict(index(op[1]), tuple(rows), index(op[3]))


def _slot(value: Any) -> int | None:
    return None if value is None else index(value)
