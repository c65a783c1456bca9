"""The schedule: which unit is computed, reused or predicted at which step. Pure data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from goc_deploy.errors import ScheduleError
from goc_deploy.strict_json import build, bytes_from_file, check_format, dump_json, parse_json

COMPUTE: tuple[float, ...] = ()
REUSE: tuple[float, ...] = (1.0,)
HISTORY_KINDS = ("used", "computed")
MAX_HISTORY = 4
MAX_STEPS = 10_000
MAX_BLOCKS = 1_000


def gradient(eta: float) -> tuple[float, ...]:
    """Coefficients of the gradient action, ``g0 + eta * (g0 - g1)``. Source: GOC, eq. 5."""
    return (1.0 + eta, -eta)


@dataclass(frozen=True, slots=True)
class Schedule:
    """Actions of every unit at every step.

    Attributes:
        depth: number of blocks.
        branches: branches of a block, in execution order.
        coefficients: [T][U] coefficients over the history, newest first; an empty tuple computes the unit.
        history: ``used`` pushes the feature that was used at every step, ``computed`` only computed features.
        short_history: ``reuse`` lets an action that reads more history than there is fall back to plain reuse;
            ``error`` refuses it.
        policy: the SPEC or file that made it, for people.
        provenance: how a policy that learns from data came to it: parameters, statistics, images; plain JSON types. For
            people; schedules that differ in nothing else are equal.
    """

    depth: int
    branches: tuple[str, ...]
    coefficients: tuple[tuple[tuple[float, ...], ...], ...]
    history: str = "used"
    short_history: str = "error"
    policy: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def steps(self) -> int:
        """Number of sampling steps T."""
        return len(self.coefficients)

    @property
    def units(self) -> int:
        """Number of units U."""
        return self.depth * len(self.branches)

    @property
    def computed(self) -> int:
        """How many of the T * U evaluations are computed."""
        return sum(not row for step in self.coefficients for row in step)

    def action(self, step: int, unit: int) -> str:
        """One of ``compute``, ``reuse``, ``gradient`` and ``blend`` (any other coefficients)."""
        row = self.coefficients[step][unit]
        if not row:
            return "compute"
        if row == REUSE:
            return "reuse"
        return "gradient" if len(row) == 2 and abs(sum(row) - 1) < 1e-9 else "blend"

    def place(self, step: int, unit: int) -> str:
        """Readable place of an evaluation, for messages."""
        block, branch = divmod(unit, len(self.branches))
        return f"step {step}, block {block}, {self.branches[branch]}"

    def available_history(self) -> Iterator[tuple[int, int, int]]:
        """Yield (step, unit, entries stored before that step) in execution order."""
        stored = [0] * self.units
        for step, rows in enumerate(self.coefficients):
            for unit, row in enumerate(rows):
                yield step, unit, stored[unit]
                if not row or self.history == "used":
                    stored[unit] += 1

    @classmethod
    def load(cls, path: str | Path) -> Schedule:
        """Read a schedule JSON file.

        Raises:
            ScheduleError: the file is missing, not JSON, or breaks the format; the message names the place.
        """

        return schedule_from_file(Path(path))

    def save(self, path: str | Path) -> None:
        """Write the schedule as hand-editable JSON."""

        Path(path).write_text(schedule_to_json(self), encoding="utf-8")


SCHEDULE_FORMAT, SCHEDULE_VERSION = "goc_deploy.schedule", 2
OLDEST_SCHEDULE_VERSION = 1  # had no provenance


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
