"""The schedule: which unit is computed, reused or predicted at which step. It is pure data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

from msgspec import Meta, Struct

from goc_deploy.blocks import MAX_BLOCKS, UnitPlace, unit_places
from goc_deploy.errors import ScheduleError
from goc_deploy.spec import ModelSpec
from goc_deploy.strict_json import (
    bytes_from_file,
    check_format,
    convert,
    dump_json,
    expected,
    parse_json,
)

COMPUTE: tuple[float, ...] = ()
REUSE: tuple[float, ...] = (1.0,)
HistoryKind = Literal["used", "computed"]
ShortHistory = Literal["reuse", "error"]
Level = Literal["unit", "residual"]
HISTORY_KINDS: tuple[HistoryKind, ...] = get_args(HistoryKind)
SHORT_HISTORY_KINDS: tuple[ShortHistory, ...] = get_args(ShortHistory)
LEVELS: tuple[Level, ...] = get_args(Level)
MAX_HISTORY = 4
MAX_STEPS = 10_000
MAX_BRANCHES = 6


def gradient(eta: float) -> tuple[float, ...]:
    """Coefficients of the gradient, ``g0 + eta * (g0 - g1)``. Source: GOC, eq. 5."""
    return (1.0 + eta, -eta)


@dataclass(frozen=True, slots=True)
class Schedule:
    """Actions of every unit at every step.

    Attributes:
        depth: number of blocks.
        branches: branches of a block, in execution order; if blocks differ, of any block.
        coefficients: [T][U] coefficients over the history, newest first; an empty tuple computes
            the unit.
        history: ``used`` stores the feature that was used at every step, ``computed`` stores only
            computed features.
        short_history: ``reuse`` replaces an action that reads more entries than are stored by plain
            reuse; ``error`` refuses the schedule.
        level: ``unit`` predicts the feature of every unit; ``residual`` predicts one feature per
            step, the tokens after the last unit minus the tokens before the first. All units of a
            step then have the same coefficients.
        blocks: the branches of each block if blocks differ, else empty.
        switch: the step at which the second set of weights of a model begins, with an empty
            history; None if one set computes all steps.
        policy: the SPEC or file that made it, for people.
        provenance: how a policy that learns from data made it: parameters, statistics, images, in
            plain JSON types. It is for people, and schedules that differ only in it are equal.
    """

    depth: int
    branches: tuple[str, ...]
    coefficients: tuple[tuple[tuple[float, ...], ...], ...]
    history: HistoryKind = "used"
    short_history: ShortHistory = "error"
    policy: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict, compare=False)
    level: Level = "unit"
    blocks: tuple[tuple[str, ...], ...] = ()
    switch: int | None = None

    @property
    def steps(self) -> int:
        """Number of sampling steps T."""
        return len(self.coefficients)

    @property
    def units(self) -> int:
        """Number of units U."""
        return len(self.places)

    @property
    def branches_of_blocks(self) -> tuple[tuple[str, ...], ...]:
        """The branches of each block."""
        return self.blocks or (self.branches,) * self.depth

    @property
    def places(self) -> tuple[UnitPlace, ...]:
        """The block and branch of each unit."""
        return unit_places(self.branches_of_blocks)

    @property
    def history_depth(self) -> int:
        """The largest number of history entries that an action reads."""
        return max(len(row) for step in self.coefficients for row in step)

    @property
    def computed(self) -> int:
        """Number of the T * U evaluations that are computed."""
        return sum(not row for step in self.coefficients for row in step)

    @property
    def feature_rows(self) -> tuple[tuple[tuple[float, ...], ...], ...]:
        """[T][F] coefficients of the features with a history: one per unit, or one residual."""
        if self.level == "unit":
            return self.coefficients
        return tuple(rows[:1] for rows in self.coefficients)

    def action(self, step: int, unit: int) -> str:
        """Return ``compute``, ``reuse``, ``gradient`` or ``blend`` (any other coefficients)."""
        row = self.coefficients[step][unit]
        if not row:
            return "compute"
        if row == REUSE:
            return "reuse"
        return "gradient" if len(row) == 2 and abs(sum(row) - 1) < 1e-9 else "blend"

    def place(self, step: int, unit: int) -> str:
        """Name the place of an evaluation for messages."""
        place = self.places[unit]
        return f"step {step}, block {place.block}, {place.branch}"

    def in_second_set(self, step: int) -> bool:
        """Whether the second set of weights computes a step."""
        return self.switch is not None and step >= self.switch

    def available_history(self) -> Iterator[tuple[int, int, int]]:
        """Yield (step, unit, entries stored before that step) in execution order.

        The features of another set of weights do not count.
        """
        stored = [0] * self.units
        for step, rows in enumerate(self.coefficients):
            if step == self.switch:
                stored = [0] * self.units
            for unit, row in enumerate(rows):
                yield step, unit, stored[unit]
                if not row or self.history == "used":
                    stored[unit] += 1

    @classmethod
    def of(
        cls, spec: ModelSpec, coefficients: tuple[tuple[tuple[float, ...], ...], ...]
    ) -> Schedule:
        """The schedule of a model with these coefficients, [T][U]."""
        blocks = spec.branches_of_blocks if spec.blocks else ()
        return cls(spec.depth, spec.branches, coefficients, blocks=blocks)

    @classmethod
    def load(cls, path: str | Path) -> Schedule:
        """Read a schedule JSON file.

        Raises:
            ScheduleError: the file is missing, is not JSON, or breaks the format; the message
                names the place.
        """
        return schedule_from_file(Path(path))

    def save(self, path: str | Path) -> None:
        """Write the schedule as hand-editable JSON."""
        Path(path).write_text(schedule_to_json(self), encoding="utf-8")


SCHEDULE_FORMAT, SCHEDULE_VERSION = "goc_deploy.schedule", 2
OLDEST_SCHEDULE_VERSION = 1  # version 1 had no provenance


def schedule_to_json(schedule: Schedule) -> str:
    """Write a schedule as hand-editable JSON.

    ``actions`` has a string per step with a word per unit (attn and mlp of block 0, then of block
    1, ...). ``C`` computes; any other word names a row of ``predictors``: coefficients over the
    history, newest first.
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
            **({"level": schedule.level} if schedule.level != "unit" else {}),
            **({"blocks": list(map(list, schedule.blocks))} if schedule.blocks else {}),
            **({"switch": schedule.switch} if schedule.switch is not None else {}),
            "predictors": {word: list(row) for row, word in words.items() if row},
            "actions": [" ".join(words[row] for row in step) for step in schedule.coefficients],
            **({"provenance": dict(schedule.provenance)} if schedule.provenance else {}),
        }
    )


def schedule_from_json(text: bytes, where: str) -> Schedule:
    """Read a schedule.

    Raises:
        ScheduleError: the text is not JSON or has another format; a field is missing or wrong; an
            action is unknown, or their number is wrong. The message has the path of the field.
    """
    fields = parse_json(text, where, ScheduleError)
    check_format(
        fields, SCHEDULE_FORMAT, SCHEDULE_VERSION, where, ScheduleError, OLDEST_SCHEDULE_VERSION
    )
    file: _ScheduleFile = convert(fields, _ScheduleFile, where, ScheduleError)
    for problem in _problems(file):
        raise ScheduleError(f"{where}: {problem}")
    words: dict[str, tuple[float, ...]] = {"C": COMPUTE}
    for word, row in file.predictors.items():
        words[word] = convert(row, _Coefficients, where, ScheduleError, f"$.predictors.{word}")
    rows = tuple(
        _step_from_text(actions, words, file, f"{where}: $.actions[{step}]: step {step}")
        for step, actions in enumerate(file.actions)
    )
    history = cast(HistoryKind, file.history)
    short_history = cast(ShortHistory, file.short_history)
    return Schedule(
        file.depth,
        file.branches,
        rows,
        history,
        short_history,
        file.policy,
        file.provenance,
        cast(Level, file.level),
        file.blocks,
        file.switch,
    )


def schedule_from_file(path: Path) -> Schedule:
    """Read a schedule file.

    Raises:
        ScheduleError: the file is unreadable, or as for `schedule_from_json`.
    """
    return schedule_from_json(
        bytes_from_file(path, f"schedule {path}", ScheduleError), f"schedule {path}"
    )


_Branches = Annotated[tuple[str, ...], Meta(min_length=1, max_length=MAX_BRANCHES)]


class _ScheduleFile(Struct):
    """The fields of a schedule file after ``format`` and ``version``."""

    depth: Annotated[int, Meta(ge=1, le=MAX_BLOCKS)]
    branches: _Branches
    history: str
    short_history: str
    policy: str
    predictors: dict[str, Any]
    actions: Annotated[tuple[str, ...], Meta(min_length=1, max_length=MAX_STEPS)]
    provenance: dict[str, Any] = {}
    level: str = "unit"
    blocks: Annotated[tuple[_Branches, ...], Meta(max_length=MAX_BLOCKS)] = ()
    switch: Annotated[int, Meta(ge=0)] | None = None


_Coefficients = Annotated[tuple[float, ...], Meta(min_length=1)]


def _problems(file: _ScheduleFile) -> Iterator[str]:
    """Yield what is wrong with fields whose types are right, each with its path."""
    if file.history not in HISTORY_KINDS:
        yield f"$.history: {expected(HISTORY_KINDS, file.history)}"
    if file.short_history not in SHORT_HISTORY_KINDS:
        yield f"$.short_history: {expected(SHORT_HISTORY_KINDS, file.short_history)}"
    if file.level not in LEVELS:
        yield f"$.level: {expected(LEVELS, file.level)}"
    if len(file.blocks) not in (0, file.depth):
        yield f"$.blocks: expected the branches of {file.depth} blocks, got {len(file.blocks)}"
    if file.switch is not None and file.switch >= len(file.actions):
        yield f"$.switch: expected one of {len(file.actions)} steps, got {file.switch}"
    if "C" in file.predictors:
        yield "$.predictors.C: a predictor cannot be named C, which computes; use another name"


def _step_from_text(
    text: str, words: Mapping[str, tuple[float, ...]], file: _ScheduleFile, where: str
) -> tuple[tuple[float, ...], ...]:
    """Parse the coefficients of every unit of a step, which ``where`` names.

    Raises:
        ScheduleError: the number of actions is wrong, or one is unknown.
    """
    actions, places = text.split(), unit_places(file.blocks or (file.branches,) * file.depth)
    if len(actions) != len(places):
        raise ScheduleError(f"{where} has {len(actions)} actions for {len(places)} units")
    for place, word in zip(places, actions, strict=True):
        if word not in words:
            raise ScheduleError(
                f"{where}, block {place.block}, {place.branch}: unknown action {word!r:.60}; "
                "use C or a name in $.predictors"
            )
    return tuple(words[word] for word in actions)
