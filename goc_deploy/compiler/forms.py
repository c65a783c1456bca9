"""The forms of a plan: which compiler passes turn a schedule into it, in which order.

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

from collections.abc import Mapping
from dataclasses import dataclass

from goc_deploy.blocks import TokenStream
from goc_deploy.compiler.check import check_plan
from goc_deploy.compiler.passes import (
    accumulate_ahead,
    assign_slots,
    group_launches,
    merge_full_steps,
    store_alike,
)
from goc_deploy.compiler.plan import Launch, Plan, PlanForm
from goc_deploy.compiler.residual import compute_all_units
from goc_deploy.compiler.sums import assign_accumulators, expand_history, push_features
from goc_deploy.compiler.values import drop_dead, name_values
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
    task = _checked(schedule, spec, sampler, steps, segments, name)
    schedule = task.schedule
    evaluations = name_values(schedule, spec)
    evaluations = drop_dead(evaluations, spec)
    if schedule.level == "unit":  # a residual takes one slot, as an accumulator would
        evaluations = accumulate_ahead(evaluations)
    groups = group_launches(evaluations)
    launches, slots = assign_slots(groups)
    if schedule.level == "residual":
        launches = compute_all_units(launches, spec, merged=False)
    return task.plan(launches, slots, "host")


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
    task = _checked(schedule, spec, sampler, steps, segments, name)
    schedule, merged = task.schedule, task.segments == "full"
    evaluations = name_values(schedule, spec)
    evaluations = drop_dead(evaluations, spec)
    if merged and schedule.level == "unit":
        evaluations = store_alike(evaluations)
        groups = group_launches(evaluations)
        groups = merge_full_steps(groups)
    else:
        groups = group_launches(evaluations)
    launches, slots = assign_slots(groups)
    if schedule.level == "residual":
        launches = compute_all_units(launches, spec, merged=merged)
    return task.plan(launches, slots, "device")


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
    task = _checked(schedule, spec, sampler, steps, segments, name)
    if task.schedule.level == "residual":
        raise UsageError(
            f"plan {name} predicts the residual of all units, which it keeps in a few tensors; its "
            "history cannot be kept as sums"
        )
    evaluations = name_values(task.schedule, spec)
    evaluations = expand_history(evaluations)
    evaluations = drop_dead(evaluations, spec)
    events = push_features(evaluations)
    launches, slots = assign_accumulators(events)
    return task.plan(launches, slots, "sums")


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


@dataclass(frozen=True, slots=True)
class _Task:
    """What a plan is compiled from, after `_checked`."""

    name: str
    spec: ModelSpec
    schedule: Schedule
    table: SamplerTable
    segments: Segments

    def plan(
        self,
        launches: tuple[tuple[Launch, ...], ...],
        slots: Mapping[TokenStream, int],
        form: PlanForm,
    ) -> Plan:
        """The plan of the compiled launches and the slots that each stream needs, checked."""
        plan = Plan(
            self.name,
            self.table,
            launches,
            slots["image"],
            self.schedule,
            self.segments,
            form=form,
            text_slots=slots["text"],
            reference_slots=slots["reference"],
        )
        check_plan(plan, self.spec)
        return plan


def _checked(
    schedule: Schedule,
    spec: ModelSpec,
    sampler: str | SamplerTable,
    steps: int | None,
    segments: Segments,
    name: str,
) -> _Task:
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
    return _Task(name, spec, schedule, table, "none" if spec.boundary else segments)
