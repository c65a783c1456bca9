"""From schedule to plan: the compiler.

The pipeline names every feature once (static single assignment), keeps only those that are read again, moves the
predictions of steps that compute nothing to where their history is at hand, groups neighbouring predictions into one
launch, and gives the survivors slots:

    schedule -> name_values -> drop_dead_stores -> accumulate_ahead -> group_launches -> assign_slots -> Plan
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import groupby, takewhile

from goc_deploy.plan import Collect, Compute, Launch, Plan, Predict, Prediction, check_plan
from goc_deploy.samplers import SamplerTable, sampler_table
from goc_deploy.schedule import MAX_HISTORY, Schedule, check_schedule, check_schedule_fits, fill_short_history
from goc_deploy.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One unit at one step, over named values instead of buffers.

    Attributes:
        step: the step whose x it updates.
        unit: the unit.
        reads: values read, newest first; empty for a computed unit.
        coefficients: one per value read.
        value: name of the feature it produces, or None where nobody reads it.
        ahead: how many steps before ``step`` it runs.
    """

    step: int
    unit: int
    reads: tuple[int, ...]
    coefficients: tuple[float, ...]
    value: int | None
    ahead: int = 0


def compile_schedule(
    schedule: Schedule,
    spec: ModelSpec,
    sampler: str | SamplerTable = "ddim",
    steps: int | None = None,
    *,
    name: str = "plan",
    collapse: bool = True,
    eager: bool = True,
) -> Plan:
    """Compile a schedule for a model, a sampler and a step count.

    Args:
        schedule: what to do where.
        spec: the model.
        sampler: a sampler SPEC or a table.
        steps: number of steps; default: the schedule's.
        name: the plan's name.
        collapse: predict neighbouring units in one launch; off, each prediction is a launch (for comparison).
        eager: predict for steps that compute nothing while the history is at hand; off, in these steps (for comparison).

    Raises:
        ScheduleError: the schedule breaks a rule of legality or does not fit.
        UsageError: unknown sampler.
    """
    schedule = fill_short_history(schedule)
    check_schedule_fits(schedule, spec, schedule.steps if steps is None else steps)
    check_schedule(schedule)
    evaluations = drop_dead_stores(name_values(schedule))
    if eager:
        evaluations = accumulate_ahead(evaluations)
    launches, slots = assign_slots(group_launches(evaluations, collapse=collapse))
    table = sampler if isinstance(sampler, SamplerTable) else sampler_table(sampler, schedule.steps)
    plan = Plan(name, table, launches, slots, schedule)
    check_plan(plan, spec)
    return plan


def name_values(schedule: Schedule) -> list[Evaluation]:
    """Name every feature that a schedule computes or predicts.

    A prediction that equals one stored feature (plain reuse) produces no new name, and a value that stands twice in
    the history is read once with the sum of its coefficients.

    Before: ``gradient`` with history (a, a). After: the prediction *is* a.
    """
    evaluations: list[Evaluation] = []
    histories: list[tuple[int, ...]] = [()] * schedule.units
    for step, rows in enumerate(schedule.coefficients):
        for unit, row in enumerate(rows):
            weights: dict[int, float] = {}
            for value, coefficient in zip(histories[unit], row, strict=False):
                weights[value] = weights.get(value, 0.0) + coefficient
            reads, coefficients = tuple(weights), tuple(weights.values())
            same_as_stored = len(reads) == 1 and abs(coefficients[0] - 1) < 1e-12
            value = reads[0] if same_as_stored else len(evaluations)
            evaluations.append(Evaluation(step, unit, reads, (1.0,) if same_as_stored else coefficients, value))
            if not row or schedule.history == "used":
                histories[unit] = (value, *histories[unit])[:MAX_HISTORY]
    return evaluations


def drop_dead_stores(evaluations: list[Evaluation]) -> list[Evaluation]:
    """Forget values that nobody reads later, and values that are stored already.

    Before: step 2 stores a feature that step 4 replaces unread. After: step 2 stores nothing.
    """
    alive: set[int] = set()
    kept: list[Evaluation] = []
    for e in reversed(evaluations):
        kept.append(e if e.value in alive and e.value not in e.reads else replace(e, value=None))
        alive.update(e.reads)
    return kept[::-1]


def accumulate_ahead(evaluations: list[Evaluation]) -> list[Evaluation]:
    """Move the predictions of steps that compute nothing up to the last step that does.

    Such predictions depend on the history alone. Made right after their unit ran, they find its feature in the CPU's
    cache, and a feature that only they read needs no slot of its own.

    Before: step 4 computes units 0 and 1, step 5 predicts 0 and 1. After: compute 0, predict 0 ahead, compute 1,
    predict 1 ahead. A unit's evaluations keep their order.
    """
    moved: list[Evaluation] = []
    steps = [list(step) for _, step in groupby(evaluations, key=lambda e: e.step)]
    while steps:
        step, *steps = steps
        collapsed = list(takewhile(lambda later: all(e.reads for e in later), steps))
        steps = steps[len(collapsed) :]
        for group in group_launches(step, collapse=True):
            moved += group
            for ahead, later in enumerate(collapsed, 1):
                moved += [replace(later[e.unit], ahead=ahead) for e in group]
    return moved


def group_launches(evaluations: list[Evaluation], *, collapse: bool) -> list[list[Evaluation]]:
    """Group evaluations into launches: a computed unit alone, neighbouring predicted units for one step together."""
    keyed = ((e.step, -1 if e.reads and collapse else e.unit, bool(e.reads)) for e in evaluations)
    pairs = zip(keyed, evaluations, strict=True)
    return [[e for _, e in run] for _, run in groupby(pairs, key=lambda pair: pair[0])]


def assign_slots(groups: list[list[Evaluation]]) -> tuple[tuple[tuple[Launch, ...], ...], int]:
    """Give every stored value a slot for as long as it lives.

    A prediction is written in place of an entry of its own unit that dies with it. Other entries that die in a launch
    are free from the next launch on, because the order of writes within a launch is not fixed.

    Returns:
        (launches by the step in which they run, number of slots).
    """
    last_read = {value: index for index, group in enumerate(groups) for e in group for value in e.reads}
    slot_of: dict[int, int] = {}
    free: list[int] = []
    slots = 0
    steps: dict[int, list[Launch]] = {}
    for index, group in enumerate(groups):
        dying = {value for e in group for value in e.reads if last_read[value] == index}
        entries: list[Prediction] = []
        for e in group:
            read_slots = tuple(slot_of[value] for value in e.reads)
            store = None
            if e.value is not None:
                own = [value for value in e.reads if value in dying]
                if own:
                    store = slot_of[own[-1]]
                    dying.remove(own[-1])
                elif free:
                    store = free.pop()
                else:
                    store, slots = slots, slots + 1
                slot_of[e.value] = store
            entries.append(Prediction(read_slots, e.coefficients, store))
        free += sorted((slot_of[value] for value in dying), reverse=True)
        first = group[0]
        compute = Compute(first.unit, entries[0].store)
        op: Launch = Predict(first.unit, tuple(entries), first.ahead) if first.reads else compute
        steps.setdefault(first.step - first.ahead, []).append(op)
        if first.ahead:
            steps.setdefault(first.step, [Collect(first.ahead)])
    return tuple(tuple(ops) for _, ops in sorted(steps.items())), slots
