"""Trials of heads on an engine directory: what a schedule reaches with a head fitted for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from goc_deploy.api.heads import check_without_noise, converged_teacher, executed, weights_of
from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.errors import ScheduleError, VerificationError
from goc_deploy.exporters.schedulers import table_from_sampler
from goc_deploy.options import Progress
from goc_deploy.policies.calibration import CalibrationOptions
from goc_deploy.policies.candidates import uncached
from goc_deploy.policies.head import HeadOptions
from goc_deploy.protocols import Backend
from goc_deploy.runtime.calibration.head_fit import HeadFit
from goc_deploy.runtime.calibration.head_task import HeadTask, Teacher
from goc_deploy.runtime.calibration.head_trial_work import (
    TrialWork,
    keep_only,
    read_measured,
    save_measured,
)
from goc_deploy.runtime.calibration.head_work import HeadWork, work_folder
from goc_deploy.runtime.calibration.stepper import Stepper, stepper_maker
from goc_deploy.samplers import SamplerTable
from goc_deploy.samplers.head import HeadFeatures
from goc_deploy.schedule import Schedule, check_amplification
from goc_deploy.spec import ModelSpec

STATE_BYTES = 2**31  # of the states from which trials go on, in the work folder


@dataclass(frozen=True, slots=True)
class _Target:
    """The latents that trials of a step count aim at.

    Attributes:
        table: the sampler of the step count.
        teacher: whose latents they are, after every step.
        work: the files of the teacher.
    """

    table: SamplerTable
    teacher: Teacher
    work: HeadWork


class EngineHeadTrials:
    """Fits heads of schedules on few images, and measures what they reach on others.

    All trials aim at the latents that one teacher reaches at the steps of the step count. A trial
    whose first steps are those of the best trial so far goes on from their state, in files of the
    work folder. The second half of the images judges, and no fit sees it.

    Implements `goc_deploy.policies.calibration.HeadTrials`.

    Args:
        directory: the engine directory.
        backend: runs it, in host memory.
        sampler: sampler SPEC.
        options: the head.
        images: the calibration images of a trial.
        progress: called with (what, done, total).
    """

    def __init__(
        self,
        directory: EngineDir,
        backend: Backend,
        sampler: str,
        options: HeadOptions,
        images: CalibrationOptions,
        progress: Progress,
    ) -> None:
        self._directory, self._backend, self._sampler = directory, backend, sampler
        self._options, self._images, self.progress = options, images, progress
        manifest, target = directory.manifest, (options.target, options.skip_predicted)
        kinds = (images, options.scales, options.scaled, sampler, target)
        self.folder = work_folder(
            "trials",
            kinds,
            manifest.model,
            manifest.precision,
            manifest.max_batch,
            weights_of(directory),
        )
        self._targets: dict[int, _Target] = {}
        self._best: tuple[float, tuple[str, ...]] = math.inf, ()
        self._trials = 0

    def error(self, schedule: Schedule, features: HeadFeatures) -> float:
        """See `goc_deploy.policies.calibration.HeadTrials.error`."""
        self._trials += 1
        self.progress(f"search, trial {self._trials}", 0, 1)
        try:
            check_amplification(schedule)
        except ScheduleError:
            return math.inf
        target, process = self._target(schedule.steps), self._directory.manifest.process
        shorter, table, ends = executed(schedule, target.table, self._options, process)
        places = tuple(target.teacher.places[end - 1] for end in ends)
        task = self._task(shorter, table, Teacher(target.teacher.table, places), features)
        names, measured = task.prefixes, read_measured(self.folder)
        if names[-1] not in measured:
            measured[names[-1]] = self._fitted(task, ends, target)
            save_measured(measured, self.folder)
        if measured[names[-1]] < self._best[0]:
            self._best = measured[names[-1]], names
        return measured[names[-1]]

    def _fitted(self, task: HeadTask, ends: Sequence[int], target: _Target) -> float:
        """The error with a head that is fitted, infinite if the schedule diverges."""
        names = task.prefixes
        keep_only(self.folder, {*names, *self._best[1]})
        stride = _stride(task, self._directory.manifest.model)
        work = TrialWork(self.folder, names, target.work, [end - 1 for end in ends], stride)
        fit = HeadFit(self._stepper, task, work, self.progress)
        try:
            fit.fit()
        except VerificationError:
            return math.inf
        return float(fit.errors()[-task.judges :].mean())

    def _target(self, steps: int) -> _Target:
        """The teacher of a step count, which runs when it is first asked for."""
        if steps not in self._targets:
            manifest = self._directory.manifest
            table = table_from_sampler(self._sampler, steps, manifest.process)
            check_without_noise(table)
            teacher = Teacher(table, tuple(range(1, steps + 1)))
            if self._options.target == "converged":
                teacher = converged_teacher(table, manifest.process)
            work = HeadWork(self.folder / f"teacher-{steps}")
            task = self._task(uncached(manifest.model, steps), table, teacher, "scalar")
            HeadFit(self._stepper, task, work, self.progress).aim()
            self._targets[steps] = _Target(table, teacher, work)
        return self._targets[steps]

    def _task(
        self, schedule: Schedule, table: SamplerTable, teacher: Teacher, features: HeadFeatures
    ) -> HeadTask:
        images, scale = self._images, self._images.cfg_scale
        return HeadTask(
            schedule,
            table,
            teacher,
            self._options.form_of(features),
            images.images,
            images.seed,
            self._options.scales or (scale, scale),
            images.cfg_channels,
            judges=images.images // 2,
        )

    @cached_property
    def _stepper(self) -> Callable[[SamplerTable], Stepper]:
        graphs = [unit.name for unit in self._directory.manifest.graphs]
        samplers: Sequence[str] = [name for name in graphs if name.startswith("sampler")]
        make = stepper_maker(self._directory, self._backend, samplers, self._images.images)
        latest: list[Stepper] = []

        def stepper(table: SamplerTable) -> Stepper:
            if not latest or latest[0].table != table:
                latest[:] = [make(table)]
            return latest[0]

        return stepper

    def describe(self) -> dict[str, Any]:
        """See `goc_deploy.policies.calibration.HeadTrials.describe`."""
        images = self._images
        return {
            "images": images.images,
            "judging_images": images.images // 2,
            "seed": images.seed,
            "cfg_scale": images.cfg_scale,
            "cfg_channels": images.cfg_channels,
            "sampler": self._sampler,
            **self._directory.manifest.checkpoint_record,
        }

    def remove(self) -> None:
        """Remove the work folder."""
        HeadWork(self.folder).remove()


def _stride(task: HeadTask, spec: ModelSpec) -> int:
    """The number of steps from one kept state to the next, so that all fit ``STATE_BYTES``."""
    schedule = task.schedule
    depth = schedule.history_depth
    entries = depth * (1 if schedule.level == "residual" else spec.units) + task.form.tokens
    state = 4 * task.images * 2 * spec.tokens * spec.hidden * entries
    return max(1, math.ceil(task.table.steps * state / STATE_BYTES))
