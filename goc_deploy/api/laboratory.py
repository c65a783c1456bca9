"""The laboratory of policies that learn: calibration, and trials of schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cached_property
from statistics import median
from typing import TYPE_CHECKING, Any

from goc_deploy.compiler import compile_schedule
from goc_deploy.conditions.labels import balanced_labels
from goc_deploy.disk import directory_lock
from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.errors import UsageError
from goc_deploy.exporters.schedulers import table_from_sampler
from goc_deploy.options import Progress
from goc_deploy.policies.calibration import (
    FULL_PRECISION,
    CalibrationOptions,
    Calibrator,
    MoreOutputs,
    Observation,
    Trial,
    check_options,
)
from goc_deploy.policies.head import HeadOptions
from goc_deploy.protocols import Backend, Engine
from goc_deploy.samplers import SamplerTable
from goc_deploy.schedule import Schedule

if TYPE_CHECKING:
    import numpy as np

    from goc_deploy.api.head_trials import EngineHeadTrials
    from goc_deploy.runtime.model_engines import Engines


class EngineLaboratory:
    """The laboratory of an engine directory, which is loaded when a policy first uses it.

    Implements `goc_deploy.policies.calibration.ObservingLaboratory`.
    """

    def __init__(
        self,
        directory: EngineDir,
        make_backend: Callable[[], Backend],
        sampler: str,
        options: CalibrationOptions,
        progress: Progress,
        full_precision: EngineDir | None = None,
    ) -> None:
        """Set what will be run.

        Args:
            directory: the engine directory; plans are not needed.
            make_backend: makes the backend that runs it, if a policy uses it.
            sampler: sampler SPEC.
            options: the calibration images.
            progress: called with (what, done, total).
            full_precision: engine directory of the same model without quantised weights, with whose
                images without cache candidates are compared; None compares with those of
                ``directory``.
        """
        self._full_precision = full_precision
        self._directory, self._make_backend = directory, make_backend
        self._sampler, self._options, self._progress = sampler, options, progress
        self._calibrators: dict[int, Calibrator] = {}
        self._trials: EngineTrials | None = None
        self._head_trials: EngineHeadTrials | None = None
        self._observed: Engines | None = None

    def calibrator(self, steps: int) -> Calibrator:
        """See `goc_deploy.policies.calibration.Laboratory.calibrator`."""
        if steps not in self._calibrators:
            from goc_deploy.runtime.calibration.calibrator import load_calibrator

            process = self._directory.manifest.process
            table = table_from_sampler(self._sampler, steps, process)
            self._calibrators[steps] = load_calibrator(
                self._directory,
                self._backend,
                table,
                self._options,
                self._progress,
                self._full_precision,
            )
        return self._calibrators[steps]

    def trials(self) -> EngineTrials:
        """See `goc_deploy.policies.calibration.Laboratory.trials`."""
        if self._trials is None:
            shared = self._backend, self._sampler, self._options, self._progress
            full = self._full_precision
            aim = None if full is None else EngineTrials(full, *shared)
            self._trials = EngineTrials(self._directory, *shared, aim)
        return self._trials

    def with_head(
        self, schedule: Schedule, table: SamplerTable, options: HeadOptions
    ) -> tuple[Schedule, SamplerTable]:
        """See `goc_deploy.api.heads.with_head`.

        Raises:
            UsageError: images in full precision are aimed at.
        """
        self._check_without_aim()
        from goc_deploy.api.heads import HeadRequest, with_head

        images = replace(self._options, images=options.images or self._options.images)
        request = HeadRequest(schedule, table, options, images)
        fitted = with_head(request, self._directory, self._backend, self._progress)
        if self._head_trials is not None:
            self._head_trials.remove()  # not before: a killed fit would begin with the search
        return fitted

    @contextmanager
    def head_trials(self, options: HeadOptions, images: int) -> Iterator[EngineHeadTrials]:
        """See `goc_deploy.policies.calibration.Laboratory.head_trials`.

        Raises:
            UsageError: images in full precision are aimed at.
        """
        self._check_without_aim()
        from goc_deploy.api.head_trials import EngineHeadTrials

        trials = EngineHeadTrials(
            self._directory,
            self._backend,
            self._sampler,
            options,
            replace(self._options, images=images),
            self._progress,
        )
        with directory_lock(trials.folder):
            yield trials
        self._head_trials = trials

    def observe(
        self,
        schedule: Schedule,
        table: SamplerTable,
        more: MoreOutputs,
        see: Callable[[Observation], None],
    ) -> None:
        """See `goc_deploy.policies.calibration.ObservingLaboratory.observe`.

        Raises:
            UsageError: an option of the images is out of range.
            VerificationError: the results are not finite.
        """
        from goc_deploy.runtime.calibration.observing import ObservingStepper, observe
        from goc_deploy.runtime.loading import load_engines

        check_options(self._options)
        manifest = self._directory.manifest
        if self._observed is None:
            names = [unit.name for unit in manifest.graphs]
            samplers = [name for name in names if name.startswith("sampler")]
            self._observed = load_engines(self._directory, (), self._backend, samplers)
        stepper = ObservingStepper(
            self._observed, self._backend, manifest, table, self._options.images, more, see
        )
        observe(stepper, schedule, self._options, self._progress)

    def _check_without_aim(self) -> None:
        if self._full_precision is not None:
            raise UsageError(
                "a head learns from the images of its own engine directory; leave out "
                "`full_precision`"
            )

    @cached_property
    def _backend(self) -> Backend:
        return self._make_backend()


class EngineTrials:
    """Compiles and runs schedules on the units of an engine directory, as its plans would run.

    Implements `goc_deploy.policies.calibration.Trials`.

    Args:
        directory: the engine directory.
        backend: runs it.
        sampler: sampler SPEC.
        options: the calibration images.
        progress: called with (what, done, total).
        aim: trials in full precision, or None.

    Raises:
        UsageError: an option out of range.
        EngineDirError, SafetyError: the directory is corrupt or not ours.
    """

    def __init__(
        self,
        directory: EngineDir,
        backend: Backend,
        sampler: str,
        options: CalibrationOptions,
        progress: Progress,
        aim: EngineTrials | None = None,
    ) -> None:
        from goc_deploy.runtime.loading import load_engines

        check_options(options)
        self._aim = aim
        self.sampler, self.options, self.progress = sampler, options, progress
        self._backend, self._manifest = backend, directory.manifest
        graphs = [unit.name for unit in self._manifest.graphs if unit.name.startswith("sampler")]
        self._engines = load_engines(directory, (), backend, [*graphs, "residual"])
        self._predict: dict[str, Engine] = {}
        self._tables: dict[int, SamplerTable] = {}

    def table(self, steps: int) -> SamplerTable:
        """See `goc_deploy.policies.calibration.Trials.table`."""
        if steps not in self._tables:
            self._tables[steps] = table_from_sampler(self.sampler, steps, self._manifest.process)
        return self._tables[steps]

    def aim(self, schedule: Schedule, images: CalibrationOptions) -> np.ndarray:
        """See `goc_deploy.policies.calibration.Trials.aim`."""
        return (self if self._aim is None else self._aim).run(schedule, images).latents

    def run(self, schedule: Schedule, images: CalibrationOptions) -> Trial:
        """See `goc_deploy.policies.calibration.Trials.run`."""
        from goc_deploy.exporters.graphs.cache_update import predict_graph
        from goc_deploy.runtime.pipeline import Pipeline

        manifest, model = self._manifest, self._manifest.model
        plan = compile_schedule(schedule, model, self.table(schedule.steps), name="trial")
        for signature in plan.signatures:
            if signature not in self._predict:
                graph = predict_graph(signature, model, manifest.precision)
                self._predict[signature] = self._backend.load(
                    memoryview(graph.SerializeToString()), {}
                )
        labels = balanced_labels(model.choices, images.images, images.seed)
        size = min(len(labels), manifest.max_batch)
        engines = replace(self._engines, predict=self._predict)
        with Pipeline(manifest, plan, engines, self._backend, size, 1) as pipe:
            result = pipe.generate(
                labels,
                seed=images.seed,
                cfg_scale=images.cfg_scale,
                cfg_channels=images.cfg_channels,
            )
        steps = [
            (step["kind"], step["ms"])
            for batch in result.report["batches"]
            for step in batch["steps"]
        ]
        kinds = {
            kind: median(ms for k, ms in steps if k == kind)
            for kind in sorted({k for k, _ in steps})
        }
        return Trial(result.latents, result.report["total_ms"], kinds)

    def describe(self) -> dict[str, Any]:
        """See `goc_deploy.policies.calibration.Trials.describe`."""
        return {
            **asdict(self.options),
            "sampler": self.sampler,
            **self._manifest.checkpoint_record,
            **({} if self._aim is None else {"aim": FULL_PRECISION}),
        }
