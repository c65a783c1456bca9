"""The compiler passes, which turn a schedule into a plan.

All pipelines name every feature once (static single assignment). `compile_for_host` stores only the
features that are read again, and moves the predictions of collapsed steps to the place where their
history was just computed. `compile_for_device` instead makes few launches of many units.
`compile_to_sums` keeps no features: it adds each to the sums of the later steps that read it:

    host:    name_values -> drop_dead_stores -> accumulate_ahead -> group_launches -> assign_slots
    device:  name_values -> drop_dead_stores -> group_launches -> assign_slots
    device, with segments:
             name_values -> drop_dead_stores -> store_alike -> group_launches -> merge_full_steps
             -> assign_slots
    sums:    name_values -> expand_history -> push_features -> assign_accumulators
    level residual:
             name_values -> drop_dead_stores -> group_launches -> assign_slots -> compute_all_units

All forms compute the same numbers. An engine directory stores the host form together with the
requested segments; `in_form` converts it to another form.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby, islice, takewhile

from goc_deploy.compiler.check import check_plan
from goc_deploy.compiler.plan import (
    MAX_LAUNCH_UNITS,
    Collect,
    Compute,
    Launch,
    Plan,
    PlanForm,
    Predict,
    Prediction,
    Segment,
)
from goc_deploy.compiler.residual import compute_all_units
from goc_deploy.compiler.sums import assign_accumulators, expand_history, push_features
from goc_deploy.compiler.values import Evaluation, drop_dead_stores, name_values
from goc_deploy.errors import UsageError
from goc_deploy.options import SEGMENTS, Segments
from goc_deploy.samplers import SamplerTable, sampler_misfit, sampler_table
from goc_deploy.samplers.process import Process
from goc_deploy.schedule import (
    Schedule,
    check_amplification,
    check_schedule,
    check_schedule_fits,
    fill_short_history,
)
from goc_deploy.spec import ModelSpec

LAUNCHES_BEFORE_AHEAD = 3  # each additional launch is a little faster and needs one more slot


def compile_for_host(
    schedule: Schedule,
    spec: ModelSpec,
    sampler: str | SamplerTable = "ddim",
    steps: int | None = None,
    *,
    name: str = "plan",
    segments: Segments = "none",
) -> Plan:
    """Compile a schedule for a CPU: every unit is a launch, and predictions are made ahead.

    Args:
        schedule: the action of every unit at every step.
        spec: the model.
        sampler: a table, or a sampler SPEC for the process that DiT and PixArt are trained on. If
            the model's folder has a scheduler, make the table with
            `goc_deploy.exporters.schedulers.table_from_sampler` and the ``process`` of the
            manifest.
        steps: number of steps; None takes the schedule's.
        name: the plan's name.
        segments: what `in_form` merges in the device form; the host form has no segments.

    Returns:
        The plan, checked with `check_plan`.

    Raises:
        ScheduleError: the schedule breaks a rule of legality or does not fit.
        UsageError: the sampler is unknown or does not fit the model, or ``segments`` is unknown.
    """
    schedule, table = _checked(schedule, spec, sampler, steps, segments)
    evaluations = name_values(schedule)
    evaluations = drop_dead_stores(evaluations)
    if schedule.level == "unit":  # a residual takes one slot, as an accumulator would
        evaluations = accumulate_ahead(evaluations)
    groups = group_launches(evaluations)
    launches, slots = assign_slots(groups)
    if schedule.level == "residual":
        launches = compute_all_units(launches, spec.units, merged=False)
    plan = Plan(name, table, launches, slots, schedule, segments, form="host")
    check_plan(plan, spec)
    return plan


def compile_for_device(
    schedule: Schedule,
    spec: ModelSpec,
    sampler: str | SamplerTable = "ddim",
    steps: int | None = None,
    *,
    name: str = "plan",
    segments: Segments = "none",
) -> Plan:
    """Compile a schedule for a GPU: a collapsed step is one launch.

    Args:
        schedule: as for `compile_for_host`.
        spec: as for `compile_for_host`.
        sampler: as for `compile_for_host`.
        steps: as for `compile_for_host`.
        name: as for `compile_for_host`.
        segments: ``full`` also makes each full step one launch.

    Returns:
        The plan, checked with `check_plan`.

    Raises:
        ScheduleError: as for `compile_for_host`.
        UsageError: as for `compile_for_host`.
    """
    schedule, table = _checked(schedule, spec, sampler, steps, segments)
    evaluations = name_values(schedule)
    evaluations = drop_dead_stores(evaluations)
    if segments == "full" and schedule.level == "unit":
        evaluations = store_alike(evaluations)
        groups = group_launches(evaluations)
        groups = merge_full_steps(groups)
    else:
        groups = group_launches(evaluations)
    launches, slots = assign_slots(groups)
    if schedule.level == "residual":
        launches = compute_all_units(launches, spec.units, merged=segments == "full")
    plan = Plan(name, table, launches, slots, schedule, segments, form="device")
    check_plan(plan, spec)
    return plan


def compile_to_sums(
    schedule: Schedule,
    spec: ModelSpec,
    sampler: str | SamplerTable = "ddim",
    steps: int | None = None,
    *,
    name: str = "plan",
    segments: Segments = "none",
) -> Plan:
    """Compile a schedule for little memory: no feature is kept, whatever the number of units.

    Every unit is a launch, also on a GPU: a segment would output the features of all units at once.

    Args:
        schedule: as for `compile_for_host`, of the level ``unit``.
        spec: as for `compile_for_host`.
        sampler: as for `compile_for_host`.
        steps: as for `compile_for_host`.
        name: as for `compile_for_host`.
        segments: as for `compile_for_host`; the form has no segments either.

    Returns:
        The plan, checked with `check_plan`.

    Raises:
        ScheduleError: as for `compile_for_host`.
        UsageError: as for `compile_for_host`, or the schedule predicts the residual, or from too
            many steps at once.
    """
    schedule, table = _checked(schedule, spec, sampler, steps, segments)
    if schedule.level == "residual":
        raise UsageError(
            f"plan {name} predicts the residual of all units, which it keeps in a few tensors; its "
            "history cannot be kept as sums"
        )
    evaluations = name_values(schedule)
    evaluations = expand_history(evaluations)
    events = push_features(evaluations)
    launches, slots = assign_accumulators(events)
    plan = Plan(name, table, launches, slots, schedule, segments, form="sums")
    check_plan(plan, spec)
    return plan


def in_form(plan: Plan, spec: ModelSpec, form: PlanForm) -> Plan:
    """Convert a plan to the form that a backend runs; the results are the same.

    Before, ``host``: step 4 computes all units and predicts for step 5, a few units at a time.
    Step 5 adds the accumulated predictions. After, ``device``: step 4 only computes, in one launch
    if the plan has segments. Step 5 is one launch that reads the history of all units. The device
    form needs more slots for the history. After, ``sums``: step 4 adds each feature that it
    computes to what steps 5, 7 and so on will add. There is one slot, and an accumulator for every
    such step.

    Raises:
        UsageError: the form is ``sums``, which the plan cannot have; see `compile_to_sums`.
    """
    if form == plan.form:
        return plan
    compilers = {"host": compile_for_host, "device": compile_for_device, "sums": compile_to_sums}
    return compilers[form](
        plan.schedule, spec, plan.sampler, name=plan.name, segments=plan.segments
    )


def _checked(
    schedule: Schedule,
    spec: ModelSpec,
    sampler: str | SamplerTable,
    steps: int | None,
    segments: Segments,
) -> tuple[Schedule, SamplerTable]:
    """Fill the short histories of a schedule, make its sampler table, and check both."""
    if segments not in SEGMENTS:
        raise UsageError(f"segments must be {' or '.join(SEGMENTS)}, got {segments!r}")
    schedule = fill_short_history(schedule)
    check_schedule_fits(schedule, spec, schedule.steps if steps is None else steps)
    check_schedule(schedule)
    check_amplification(schedule)
    table = (
        sampler
        if isinstance(sampler, SamplerTable)
        else sampler_table(sampler, schedule.steps, Process(spec.prediction_type))
    )
    misfit = sampler_misfit(table, spec)
    if misfit:
        raise UsageError(misfit)
    return schedule, table


def store_alike(evaluations: list[Evaluation]) -> list[Evaluation]:
    """Make all full steps store the features of the same units, so that one engine serves them.

    Before: step 4 stores units 0 and 1, step 8 stores nothing. After: step 8 stores units 0 and 1
    too, although no step reads them.
    """
    predicting = {e.step for e in evaluations if e.reads}
    stored = {e.unit for e in evaluations if e.step not in predicting and e.value is not None}
    return [
        replace(e, value=index)
        if e.step not in predicting and e.unit in stored
        else e  # as `name_values` names it
        for index, e in enumerate(evaluations)
    ]


def accumulate_ahead(evaluations: list[Evaluation]) -> list[Evaluation]:
    """Move the predictions of collapsed steps into the last step that computes a unit.

    These predictions depend on the history alone. If they are made soon after their unit ran, a
    feature that only they read occupies a slot for a short time. A few units are predicted at a
    time, because a launch is faster if its temporary tensors fit into the CPU's cache (DiT-XL/2,
    gradient of all units: 38 ms with one unit per launch, 33 ms with four).

    Before: step 4 computes units 0 and 1, step 5 predicts 0 and 1. After: step 4 computes 0 and 1
    and predicts both ahead. The order of the evaluations of each unit does not change.
    """
    moved: list[Evaluation] = []
    steps = [list(step) for _, step in groupby(evaluations, key=lambda e: e.step)]
    while steps:
        step, *steps = steps
        collapsed = list(takewhile(lambda later: all(e.reads for e in later), steps))
        steps = steps[len(collapsed) :]
        groups = iter(group_launches(step))
        while some := list(islice(groups, LAUNCHES_BEFORE_AHEAD)):
            ran = [e for group in some for e in group]
            moved += ran
            moved += [
                replace(later[e.unit], ahead=ahead)
                for ahead, later in enumerate(collapsed, 1)
                for e in ran
            ]
    return moved


def group_launches(evaluations: list[Evaluation]) -> list[list[Evaluation]]:
    """Group evaluations into launches of at most `MAX_LAUNCH_UNITS` units.

    Adjacent predictions for one step share a launch. Every computed unit is a launch of its own.

    Before: step 4 predicts units 0 and 1 and computes unit 2. After: step 4 launches units 0 and 1
    together, then unit 2.
    """

    def launch(e: Evaluation) -> tuple[int, int | None]:
        return e.step, None if e.reads else e.unit

    runs = [list(run) for _, run in groupby(evaluations, key=launch)]
    return [
        run[i : i + MAX_LAUNCH_UNITS] for run in runs for i in range(0, len(run), MAX_LAUNCH_UNITS)
    ]


def merge_full_steps(groups: list[list[Evaluation]]) -> list[list[Evaluation]]:
    """Merge the launches of each full step into one.

    Before: step 4 launches units 0, 1, 2 and 3. After: step 4 is one launch of units 0 to 3.
    """
    steps = [list(step) for _, step in groupby(groups, key=lambda group: group[0].step)]
    merged: list[list[Evaluation]] = []
    for step in steps:
        units = [e for group in step for e in group]
        merged += step if any(e.reads for e in units) else [units]
    return merged


def assign_slots(groups: list[list[Evaluation]]) -> tuple[tuple[tuple[Launch, ...], ...], int]:
    """Assign a slot to every stored value, for as long as the value is needed.

    A prediction overwrites the oldest entry of its own unit that is read for the last time in the
    same launch. Any other value prefers a slot that its unit used before. As a result, steps of
    one kind use the same slots, and their launches are the same. All other slots whose values are
    read for the last time in a launch are free from the next launch on, because the order of
    writes within a launch is not fixed. The same holds for values that are never read.

    Returns:
        (launches by the step in which they run, number of slots).
    """
    last_read = {
        value: index for index, group in enumerate(groups) for e in group for value in e.reads
    }
    slot_of: dict[int, int] = {}
    free: list[int] = []
    owner: dict[int, int] = {}  # slot -> the unit that used it last
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
                    oldest = min(own)  # values are numbered in the order of evaluation
                    store = slot_of[oldest]
                    dying.remove(oldest)
                elif free:
                    kept = [slot for slot in free if owner[slot] == e.unit]
                    store = kept[-1] if kept else free[-1]
                    free.remove(store)
                else:
                    store, slots = slots, slots + 1
                slot_of[e.value], owner[store] = store, e.unit
                if e.value not in last_read:
                    dying.add(e.value)
            entries.append(Prediction(read_slots, e.coefficients, store))
        free += sorted((slot_of[value] for value in dying), reverse=True)
        first = group[0]
        steps.setdefault(first.step - first.ahead, []).append(_launch(first, entries))
        if first.ahead:
            steps.setdefault(first.step, [Collect(first.ahead)])
    return tuple(tuple(ops) for _, ops in sorted(steps.items())), slots


def _launch(first: Evaluation, entries: list[Prediction]) -> Launch:
    """Make the launch of a group of evaluations, of which this is the first."""
    if first.reads:
        return Predict(first.unit, tuple(entries), first.ahead)
    stores = tuple(entry.store for entry in entries)
    return Segment(stores) if len(stores) > 1 else Compute(first.unit, stores[0])
