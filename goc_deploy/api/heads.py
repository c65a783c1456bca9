"""Heads of plans: what is fitted to whose latents, on an engine directory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from goc_deploy.disk import directory_lock
from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.errors import UsageError
from goc_deploy.options import Progress
from goc_deploy.policies.calibration import CalibrationOptions, check_options
from goc_deploy.policies.head import HeadOptions, computed_steps, without_predicted_steps
from goc_deploy.protocols import Backend
from goc_deploy.runtime.calibration.head_fit import HeadFit
from goc_deploy.runtime.calibration.head_task import HeadTask, Teacher
from goc_deploy.runtime.calibration.head_work import HeadWork, work_folder
from goc_deploy.runtime.calibration.stepper import Stepper, load_stepper
from goc_deploy.samplers import SamplerTable, refined_table, table_at
from goc_deploy.samplers.process import Process
from goc_deploy.schedule import Schedule


@dataclass(frozen=True, slots=True)
class HeadRequest:
    """The plan that gets a head.

    Attributes:
        schedule: what it computes.
        table: its sampler.
        options: the head.
        images: the calibration images.
    """

    schedule: Schedule
    table: SamplerTable
    options: HeadOptions
    images: CalibrationOptions


def with_head(
    request: HeadRequest, directory: EngineDir, backend: Backend, progress: Progress
) -> tuple[Schedule, SamplerTable]:
    """Fit a head on an engine directory.

    What is finished stays in a folder of the user's cache until the head is complete, so a fit that
    was killed goes on where it was.

    Args:
        request: the plan and the options of the head.
        directory: the engine directory.
        backend: runs it, in host memory.
        progress: called with (what, done, total).

    Returns:
        The schedule, without the predicted steps if the options leave them out, and with the
        record of the fit; and its sampler with the head.

    Raises:
        UsageError: a sampler with fresh noise, or one that has no table at the computed steps or no
            converged solution; steps that compute a part; options out of range.
        ScheduleError: the schedule has another number of steps than the sampler.
        ConflictError, ResourceError: the work folder is in use or cannot be written.
        VerificationError: the plan, or the model without cache, diverges.
    """
    check_options(request.images)
    schedule, table, teacher = _aimed(request, directory.manifest.process)
    images, options, manifest = request.images, request.options, directory.manifest
    scales = options.scales or (images.cfg_scale, images.cfg_scale)
    task = HeadTask(
        schedule,
        table,
        teacher,
        options.form,
        images.images,
        images.seed,
        scales,
        images.cfg_channels,
    )
    folder = work_folder(
        task.decides, manifest.model, manifest.precision, manifest.max_batch, weights_of(directory)
    )

    def make_stepper(sampler: SamplerTable) -> Stepper:
        return load_stepper(directory, backend, sampler, images.images)

    with directory_lock(folder):
        work = HeadWork(folder)
        head, fitted = HeadFit(make_stepper, task, work, progress).fitted()
        work.remove()
    record = {"head": {**_record(request, directory, task), **fitted}}
    schedule = replace(schedule, provenance={**schedule.provenance, **record})
    return schedule, replace(table, head=head)


def _aimed(request: HeadRequest, process: Process) -> tuple[Schedule, SamplerTable, Teacher]:
    """The schedule and the sampler of the plan with the head, and whose latents the head aims at.

    Raises:
        UsageError: as for `with_head`.
    """
    options = request.options
    schedule, table, places = executed(request.schedule, request.table, options, process)
    teacher = Teacher(request.table, places)
    if options.target == "converged":
        teacher = converged_teacher(table, process)
    return schedule, table, teacher


def converged_teacher(table: SamplerTable, process: Process) -> Teacher:
    """The converged solution at the times of a sampler, which has no fresh noise.

    Raises:
        UsageError: the sampler has no converged solution.
    """
    refined, places = refined_table(table, process)
    return Teacher(refined, places[1:])


def executed(
    schedule: Schedule, table: SamplerTable, options: HeadOptions, process: Process
) -> tuple[Schedule, SamplerTable, tuple[int, ...]]:
    """What is left of a schedule and its sampler if the options leave the predicted steps out.

    Returns:
        The schedule, its sampler, and for each of its steps how many steps of ``table`` lead to the
        latents that it results in.

    Raises:
        UsageError: a sampler with fresh noise, or one that has no table at the computed steps;
            steps that compute a part.
    """
    check_without_noise(table)
    if not options.skip_predicted:
        return schedule, table, tuple(range(1, table.steps + 1))
    kept, family = computed_steps(schedule), table.sampler.partition("@")[0]
    schedule = without_predicted_steps(schedule)
    shorter = table_at(family, [table.timesteps[step] for step in kept], process)
    return schedule, shorter, (*kept[1:], table.steps)


def check_without_noise(table: SamplerTable) -> None:
    """Check that a sampler can have a head.

    Raises:
        UsageError: it draws fresh noise.
    """
    if table.stochastic:
        raise UsageError(
            f"+head: sampler {table.sampler!r} draws fresh noise, so there are no latents to aim "
            "at; use ddim, dpm++ or euler"
        )


def weights_of(directory: EngineDir) -> list[tuple[str, str]]:
    """Path and digest of the files that decide what the model computes."""
    manifest = directory.manifest
    return sorted(
        (file.path, file.sha256)
        for file in manifest.files
        if file.path.endswith(".weights") or file.path == manifest.stored_captions
    )


def _record(request: HeadRequest, directory: EngineDir, task: HeadTask) -> dict[str, Any]:
    """Options and images, as plain data for the schedule file."""
    options, images = request.options, request.images
    lowest, highest = task.cfg_scales
    return {
        "features": options.features,
        "target": options.target,
        "scaled": options.scaled,
        "cfg_scales": [lowest, highest],
        "calibration": {
            "images": images.images,
            "seed": images.seed,
            "cfg_channels": images.cfg_channels,
            "sampler": task.table.sampler,
            "steps": task.table.steps,
            **directory.manifest.checkpoint_record,
        },
    }
