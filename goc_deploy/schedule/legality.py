"""The rules of legality of schedules, and the check that a schedule fits a model."""

from __future__ import annotations

from dataclasses import replace

from goc_deploy.errors import ScheduleError
from goc_deploy.schedule.schedule import (
    COMPUTE,
    HISTORY_KINDS,
    LEVELS,
    MAX_HISTORY,
    MAX_STEPS,
    REUSE,
    Schedule,
)
from goc_deploy.spec import ModelSpec

MAX_AMPLIFICATION = 1e3


def check_schedule(schedule: Schedule) -> None:
    """Check the rules of legality.

    Raises:
        ScheduleError: naming step, block and branch of the first evaluation that breaks a rule.
    """
    if schedule.history not in HISTORY_KINDS:
        raise ScheduleError(
            f"history {schedule.history!r} is not one of {', '.join(HISTORY_KINDS)}"
        )
    if schedule.level not in LEVELS:
        raise ScheduleError(f"level {schedule.level!r} is not one of {', '.join(LEVELS)}")
    if not 1 <= schedule.steps <= MAX_STEPS:
        raise ScheduleError(f"a schedule has 1 to {MAX_STEPS} steps, this one has {schedule.steps}")
    check_whole_steps(schedule)
    for step, unit, stored in schedule.available_history():
        row = schedule.coefficients[step][unit]
        where = schedule.place(step, unit)
        if step == 0 and row:
            raise ScheduleError(
                f"{where}: {schedule.action(0, unit)} at step 0, where nothing is stored yet; "
                "compute it"
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
            of_set = ""
            if schedule.in_second_set(step):
                of_set = f" since step {schedule.switch}, where the second set of weights begins"
            raise ScheduleError(
                f"{where}: {schedule.action(step, unit)} reads {len(row)} history entries but only "
                f"{stored} {'is' if stored == 1 else 'are'} stored{of_set}; compute this unit at "
                f"{'this step' if step == schedule.switch else 'an earlier step'}, or use plain "
                "reuse"
            )


def check_whole_steps(schedule: Schedule) -> None:
    """Check that all units of a step have the same coefficients if its residual is predicted.

    Raises:
        ScheduleError: naming step, block and branch of the first unit that has others.
    """
    if schedule.level == "unit":
        return
    for step, (first, *others) in enumerate(schedule.coefficients):
        for unit, row in enumerate(others, 1):
            if row != first:
                raise ScheduleError(
                    f"{schedule.place(step, unit)}: {_written(row)}, but the first unit of the "
                    f"step has {_written(first)}; level=residual predicts all units of a step as "
                    "one, so use a policy that treats them alike, or leave out level=residual"
                )


def _written(row: tuple[float, ...]) -> str:
    return f"coefficients {' '.join(f'{c:g}' for c in row)}" if row else "compute"


def check_schedule_fits(schedule: Schedule, spec: ModelSpec, steps: int) -> None:
    """Check that a schedule fits this model and step count.

    Raises:
        ScheduleError: naming both sizes.
    """
    if schedule.steps != steps:
        raise ScheduleError(
            f"the schedule has {schedule.steps} steps but {steps} are asked for; "
            f"use `steps={schedule.steps}` or a schedule with that many steps"
        )
    if schedule.branches_of_blocks != spec.branches_of_blocks:
        raise ScheduleError(
            f"the schedule is for {schedule.depth} blocks of {'+'.join(schedule.branches)} but the "
            f"model has {spec.depth} blocks of {'+'.join(spec.branches)}"
        )


def fill_short_history(schedule: Schedule) -> Schedule:
    """Replace actions that read more entries than are stored by reuse, if the policy allows it.

    Before: step 1 is ``gradient`` with one entry stored and ``short_history`` is ``reuse``.
    After: step 1 is ``reuse``.
    """
    return _with_short_reads_as_reuse(schedule) if schedule.short_history == "reuse" else schedule


def begin_second_set(schedule: Schedule, switch: int) -> Schedule:
    """Let the second set of weights of a model begin without a history, for any policy.

    The features of the first set are those of other weights, so the second predicts nothing from
    them.

    Before: step 3, the first of the second set, is ``reuse``, and step 4 is ``gradient``. After:
    step 3 is ``compute``, and step 4 is ``reuse``, because one entry is stored.

    Args:
        schedule: a legal schedule without a switch.
        switch: the first step of the second set.
    """
    rows = list(schedule.coefficients)
    rows[switch] = (COMPUTE,) * schedule.units
    return _with_short_reads_as_reuse(replace(schedule, coefficients=tuple(rows), switch=switch))


def _with_short_reads_as_reuse(schedule: Schedule) -> Schedule:
    """Replace actions that read more entries than are stored, but at least one is, by reuse."""
    rows = [list(step) for step in schedule.coefficients]
    for step, unit, stored in schedule.available_history():
        if 1 <= stored < len(rows[step][unit]):
            rows[step][unit] = REUSE
    return replace(schedule, coefficients=tuple(tuple(step) for step in rows))


def check_amplification(schedule: Schedule) -> None:
    """Check that predictions from earlier predictions do not amplify errors too much.

    With history ``used``, the gradient at every second step is a recurrence with its pole at -eta.
    With |eta| > 1, its weights of the computed features grow without bound. The sum of their
    magnitudes must not exceed ``MAX_AMPLIFICATION``, so a large eta may serve a few steps but not
    many.

    Raises:
        ScheduleError: naming step, block and branch of the first prediction beyond the limit.
    """
    for unit in range(schedule.units):
        # Newest first; each entry has weights over the steps that computed the unit.
        history: list[dict[int, float]] = []
        for step, rows in enumerate(schedule.coefficients):
            row, weights = rows[unit], {step: 1.0}
            if row:
                weights = {}
                for coefficient, entry in zip(row, history, strict=False):
                    for computed, weight in entry.items():
                        weights[computed] = weights.get(computed, 0.0) + coefficient * weight
                if not sum(map(abs, weights.values())) <= MAX_AMPLIFICATION:
                    raise ScheduleError(
                        f"{schedule.place(step, unit)}: the prediction amplifies errors of "
                        f"computed features more than {MAX_AMPLIFICATION:g}-fold, because it reads "
                        "earlier predictions; use an eta within -1..1, fewer such steps, or "
                        "history=computed"
                    )
            if not row or schedule.history == "used":
                history = [weights, *history][:MAX_HISTORY]
