"""The schedule: which unit is computed, reused or predicted at which step. Pure data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from goc_deploy.errors import ScheduleError
from goc_deploy.spec import ModelSpec

COMPUTE: tuple[float, ...] = ()
REUSE: tuple[float, ...] = (1.0,)
HISTORY_KINDS = ("used", "computed")
MAX_HISTORY = 4
MAX_STEPS = 10_000
MAX_BLOCKS = 1_000
MAX_AMPLIFICATION = 1e3


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
        from goc_deploy.serde import schedule_from_file

        return schedule_from_file(Path(path))

    def save(self, path: str | Path) -> None:
        """Write the schedule as hand-editable JSON."""
        from goc_deploy.serde import schedule_to_json

        Path(path).write_text(schedule_to_json(self), encoding="utf-8")


def check_schedule(schedule: Schedule) -> None:
    """Check the rules of legality.

    Raises:
        ScheduleError: naming step, block and branch of the first evaluation that breaks a rule.
    """
    if schedule.history not in HISTORY_KINDS:
        raise ScheduleError(
            f"history {schedule.history!r} is not one of {', '.join(HISTORY_KINDS)}"
        )
    if not 1 <= schedule.steps <= MAX_STEPS:
        raise ScheduleError(f"a schedule has 1 to {MAX_STEPS} steps, this one has {schedule.steps}")
    for step, unit, stored in schedule.available_history():
        row = schedule.coefficients[step][unit]
        where = schedule.place(step, unit)
        if step == 0 and row:
            raise ScheduleError(
                f"{where}: {schedule.action(0, unit)} at step 0, where nothing is stored yet; compute it"
            )
        if len(row) > MAX_HISTORY:
            raise ScheduleError(
                f"{where}: {len(row)} coefficients, at most {MAX_HISTORY} are supported"
            )
        if any(not abs(c) < 1e6 for c in row):
            raise ScheduleError(
                f"{where}: coefficients {list(row)} must be finite and below 1e6 in magnitude"
            )
        if len(row) > stored:
            raise ScheduleError(
                f"{where}: {schedule.action(step, unit)} reads {len(row)} history entries but only {stored} "
                f"{'is' if stored == 1 else 'are'} stored; compute this unit at an earlier step, or use plain reuse"
            )


def check_schedule_fits(schedule: Schedule, spec: ModelSpec, steps: int) -> None:
    """Check that a schedule is for this model and step count.

    Raises:
        ScheduleError: naming both sizes.
    """
    if schedule.steps != steps:
        raise ScheduleError(
            f"the schedule has {schedule.steps} steps but {steps} are asked for; use --steps {schedule.steps} or a schedule with that many steps"
        )
    if (schedule.depth, schedule.branches) != (spec.depth, spec.branches):
        raise ScheduleError(
            f"the schedule is for {schedule.depth} blocks of {'+'.join(schedule.branches)} but the model has "
            f"{spec.depth} blocks of {'+'.join(spec.branches)}"
        )


def fill_short_history(schedule: Schedule) -> Schedule:
    """Replace actions that read more history than there is by plain reuse, where the policy allows it.

    Before: step 1 is ``gradient`` with one entry stored and ``short_history`` is ``reuse``.
    After: step 1 is ``reuse``.
    """
    if schedule.short_history != "reuse":
        return schedule
    rows = [list(step) for step in schedule.coefficients]
    for step, unit, stored in schedule.available_history():
        if 1 <= stored < len(rows[step][unit]):
            rows[step][unit] = REUSE
    return replace(schedule, coefficients=tuple(tuple(step) for step in rows))


def check_amplification(schedule: Schedule) -> None:
    """Check that predictions made of predictions do not blow up what they are made of.

    With history ``used``, the gradient at every second step is a recurrence with its pole at -eta: with |eta| > 1 its
    weights over the features that were really computed grow without bound. Their sum of magnitudes must stay within
    ``MAX_AMPLIFICATION``, so a large eta may serve a few steps but not many.

    Raises:
        ScheduleError: naming step, block and branch of the first prediction beyond it.
    """
    for unit in range(schedule.units):
        history: list[
            dict[int, float]
        ] = []  # newest first: weights over the steps that computed the unit
        for step, rows in enumerate(schedule.coefficients):
            row, weights = rows[unit], {step: 1.0}
            if row:
                weights = {}
                for coefficient, entry in zip(row, history, strict=False):
                    for computed, weight in entry.items():
                        weights[computed] = weights.get(computed, 0.0) + coefficient * weight
                if not sum(map(abs, weights.values())) <= MAX_AMPLIFICATION:
                    raise ScheduleError(
                        f"{schedule.place(step, unit)}: the prediction amplifies errors of computed features more than "
                        f"{MAX_AMPLIFICATION:g}-fold, because it reads earlier predictions; use an eta within -1..1, fewer "
                        "such steps, or history=computed"
                    )
            if not row or schedule.history == "used":
                history = [weights, *history][:MAX_HISTORY]
