"""The compiler passes, which turn a schedule into a plan.

All pipelines name every feature once (static single assignment). `compile_for_host` stores only the
features that are read again, and moves the predictions of collapsed steps to the place where their
history was just computed. `compile_for_device` instead makes few launches of many units.
`compile_to_sums` keeps no features: it adds each to the sums of the later steps that read it:

    host:    name_values -> drop_dead -> accumulate_ahead -> group_launches -> assign_slots
    device:  name_values -> drop_dead -> group_launches -> assign_slots
    device, with segments:
             name_values -> drop_dead -> store_alike -> group_launches -> merge_full_steps
             -> assign_slots
    sums:    name_values -> expand_history -> drop_dead -> push_features -> assign_accumulators
    level residual:
             name_values -> drop_dead -> group_launches -> assign_slots -> compute_all_units

All forms compute the same numbers. An engine directory stores the host form together with the
requested segments; `in_form` converts it to another form.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from itertools import groupby, islice, takewhile

from goc_deploy.blocks import ALL_STREAMS, TokenStream
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
from goc_deploy.compiler.values import Evaluation, drop_dead, name_values
from goc_deploy.errors import ScheduleError, UsageError
from goc_deploy.options import SEGMENTS, Segments
from goc_deploy.samplers import SamplerTable, sampler_misfit, sampler_table, switch_step
from goc_deploy.samplers.process import Process
from goc_deploy.schedule import (
    Schedule,
    begin_second_set,
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
    schedule, table, segments = _checked(schedule, spec, sampler, steps, segments)
    evaluations = name_values(schedule, spec)
    evaluations = drop_dead(evaluations, spec)
    if schedule.level == "unit":  # a residual takes one slot, as an accumulator would
        evaluations = accumulate_ahead(evaluations)
    groups = group_launches(evaluations)
    launches, slots = assign_slots(groups)
    if schedule.level == "residual":
        launches = compute_all_units(launches, spec, merged=False)
    plan = Plan(
        name,
        table,
        launches,
        slots["image"],
        schedule,
        segments,
        form="host",
        text_slots=slots["text"],
        reference_slots=slots["reference"],
    )
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
    schedule, table, segments = _checked(schedule, spec, sampler, steps, segments)
    evaluations = name_values(schedule, spec)
    evaluations = drop_dead(evaluations, spec)
    if segments == "full" and schedule.level == "unit":
        evaluations = store_alike(evaluations)
        groups = group_launches(evaluations)
        groups = merge_full_steps(groups)
    else:
        groups = group_launches(evaluations)
    launches, slots = assign_slots(groups)
    if schedule.level == "residual":
        launches = compute_all_units(launches, spec, merged=segments == "full")
    plan = Plan(
        name,
        table,
        launches,
        slots["image"],
        schedule,
        segments,
        form="device",
        text_slots=slots["text"],
        reference_slots=slots["reference"],
    )
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
    schedule, table, segments = _checked(schedule, spec, sampler, steps, segments)
    if schedule.level == "residual":
        raise UsageError(
            f"plan {name} predicts the residual of all units, which it keeps in a few tensors; its "
            "history cannot be kept as sums"
        )
    evaluations = name_values(schedule, spec)
    evaluations = expand_history(evaluations)
    evaluations = drop_dead(evaluations, spec)
    events = push_features(evaluations)
    launches, slots = assign_accumulators(events)
    plan = Plan(
        name,
        table,
        launches,
        slots["image"],
        schedule,
        segments,
        form="sums",
        text_slots=slots["text"],
        reference_slots=slots["reference"],
    )
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
) -> tuple[Schedule, SamplerTable, Segments]:
    """Fill the short histories of a schedule, make its sampler table, and check both.

    If the model has two sets of weights, the schedule computes all units where the second begins,
    and there are no segments, which would have the units of one set.
    """
    if segments not in SEGMENTS:
        raise UsageError(f"segments must be {' or '.join(SEGMENTS)}, got {segments!r}")
    schedule = fill_short_history(schedule)
    check_schedule_fits(schedule, spec, schedule.steps if steps is None else steps)
    check_schedule(schedule)
    table = (
        sampler
        if isinstance(sampler, SamplerTable)
        else sampler_table(sampler, schedule.steps, Process(spec.prediction_type))
    )
    misfit = sampler_misfit(table, spec)
    if misfit:
        raise UsageError(misfit)
    switch = switch_step(table, spec)
    if schedule.switch is None and switch is not None:
        schedule = begin_second_set(schedule, switch)
    if schedule.switch != switch:
        raise ScheduleError(
            f"the schedule switches to a second set of weights at step {schedule.switch}, "
            f"but the model and sampler {table.sampler!r} "
            f"switch at {'no step' if switch is None else f'step {switch}'}; leave its switch out"
        )
    check_amplification(schedule)
    return schedule, table, "none" if spec.boundary else segments


def store_alike(evaluations: list[Evaluation]) -> list[Evaluation]:
    """Make all full steps store the same features, so that one engine serves them.

    Before: step 4 stores features 0 and 1, step 8 stores nothing. After: step 8 stores features 0
    and 1 too, although no step reads them.
    """
    predicting = {e.step for e in evaluations if e.reads}
    stored = {e.feature for e in evaluations if e.step not in predicting and e.value is not None}
    new = itertools.count(1 + max((e.value for e in evaluations if e.value is not None), default=0))
    return [
        replace(e, value=next(new))
        if e.step not in predicting and e.value is None and e.feature in stored
        else e
        for e in evaluations
    ]


def accumulate_ahead(evaluations: list[Evaluation]) -> list[Evaluation]:
    """Move the predictions of collapsed steps into the last step that computes a unit.

    These predictions depend on the history alone. If they are made soon after their unit ran, a
    feature that only they read occupies a slot for a short time. A few units are predicted at a
    time, because a launch is faster if its temporary tensors fit into the CPU's cache (DiT-XL/2,
    gradient of all units: 38 ms with one unit per launch, 33 ms with four).

    Before: step 4 computes units 0 and 1, step 5 predicts 0 and 1. After: step 4 computes 0 and 1
    and predicts both ahead. The order of the evaluations of each feature does not change. A step
    that predicts features of other streams, because a later prediction reads them, stays as it is.
    """
    moved: list[Evaluation] = []
    steps = [list(step) for _, step in groupby(evaluations, key=lambda e: e.step)]
    while steps:
        step, *steps = steps
        collapsed = [{e.feature: e for e in later} for later in takewhile(_is_collapsed, steps)]
        steps = steps[len(collapsed) :]
        groups = iter(group_launches(step))
        while some := list(islice(groups, LAUNCHES_BEFORE_AHEAD)):
            ran = [e for group in some for e in group]
            moved += ran
            moved += [
                replace(later[e.feature], ahead=ahead)
                for ahead, later in enumerate(collapsed, 1)
                for e in ran
                if e.feature in later
            ]
    return moved


def _is_collapsed(step: list[Evaluation]) -> bool:
    """Whether a step computes no unit and changes the image only."""
    return all(e.reads and e.stream == "image" for e in step)


def group_launches(evaluations: list[Evaluation]) -> list[list[Evaluation]]:
    """Group evaluations into launches of at most `MAX_LAUNCH_UNITS` predictions.

    Predictions of adjacent features of a stream for one step share a launch. Every computed unit is
    a launch of its own, with all its features.

    Before: step 4 predicts units 0 and 1 and computes unit 2. After: step 4 launches the features
    of the image of units 0 and 1 together, then those of other streams, then unit 2.
    """

    def launch(e: Evaluation) -> tuple[int, int | None]:
        return e.step, None if e.reads else e.unit

    groups: list[list[Evaluation]] = []
    for _, run in groupby(evaluations, key=launch):
        by_stream = sorted(run, key=lambda e: ALL_STREAMS.index(e.stream))
        if not by_stream[0].reads:
            groups.append(by_stream)
            continue
        group: list[Evaluation] = []
        for e in by_stream:
            before = (e.stream, e.feature - 1)
            follows = group and (group[-1].stream, group[-1].feature) == before
            if not follows or len(group) == MAX_LAUNCH_UNITS:
                group = []
                groups.append(group)
            group.append(e)
    return groups


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


def assign_slots(
    groups: list[list[Evaluation]],
) -> tuple[tuple[tuple[Launch, ...], ...], Counter[TokenStream]]:
    """Assign a slot of its stream to every stored value, for as long as the value is needed.

    A prediction overwrites the oldest entry of its own feature that is read for the last time in
    the same launch. Any other value prefers a slot that its feature used before. As a result, steps
    of one kind use the same slots, and their launches are the same. All other slots whose values
    are read for the last time in a launch are free from the next launch on, because the order of
    writes within a launch is not fixed. The same holds for values that are never read.

    Returns:
        (launches by the step in which they run, number of slots of each stream).
    """
    last_read = {
        value: index for index, group in enumerate(groups) for e in group for value in e.reads
    }
    slot_of: dict[int, int] = {}
    stream_of = {e.value: e.stream for group in groups for e in group if e.value is not None}
    free: dict[TokenStream, list[int]] = {stream: [] for stream in ALL_STREAMS}
    owner: dict[tuple[TokenStream, int], int] = {}  # slot -> the feature that used it last
    slots: Counter[TokenStream] = Counter()
    steps: dict[int, list[Launch]] = {}
    for index, group in enumerate(groups):
        dying = {value for e in group for value in e.reads if last_read[value] == index}
        entries: list[Prediction] = []
        for e in group:
            read_slots = tuple(slot_of[value] for value in e.reads)
            store, of_stream = None, free[e.stream]
            if e.value is not None:
                own = [value for value in e.reads if value in dying]
                if own:
                    oldest = min(own)  # values are numbered in the order of evaluation
                    store = slot_of[oldest]
                    dying.remove(oldest)
                elif of_stream:
                    kept = [slot for slot in of_stream if owner[e.stream, slot] == e.feature]
                    store = kept[-1] if kept else of_stream[-1]
                    of_stream.remove(store)
                else:
                    store = slots[e.stream]
                    slots[e.stream] += 1
                slot_of[e.value], owner[e.stream, store] = store, e.feature
                if e.value not in last_read:
                    dying.add(e.value)
            entries.append(Prediction(read_slots, e.coefficients, store))
        for value in sorted(dying, key=slot_of.__getitem__, reverse=True):
            free[stream_of[value]].append(slot_of[value])
        first = group[0]
        steps.setdefault(first.step - first.ahead, []).append(_launch(group, entries))
        if first.ahead:
            steps.setdefault(first.step, [Collect(first.ahead)])
    return tuple(tuple(ops) for _, ops in sorted(steps.items())), slots


def _launch(group: list[Evaluation], entries: list[Prediction]) -> Launch:
    """Make the launch of a group of evaluations."""
    first = group[0]
    if first.reads:
        return Predict(first.feature, tuple(entries), first.ahead, first.stream)
    stores = tuple(entry.store for entry in entries)
    one = all(e.unit == first.unit for e in group)
    return Compute(first.unit, stores) if one else Segment(stores)
