"""Calibration on an engine directory: statistics of uncached images, and errors of schedules."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import repeat
from typing import Any

import numpy as np

from goc_deploy.blocks import TokenStream
from goc_deploy.compiler.values import features_of_units
from goc_deploy.conditions.captions import conditions_from_labels
from goc_deploy.conditions.labels import balanced_labels
from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.errors import ScheduleError, VerificationError
from goc_deploy.options import Progress, no_progress
from goc_deploy.policies.calibration import (
    FULL_PRECISION,
    MAX_GAP,
    CalibrationOptions,
    Statistics,
    check_options,
    measured_error,
)
from goc_deploy.policies.fit import FitOptions
from goc_deploy.protocols import Backend
from goc_deploy.runtime.calibration.fit_final import Pair, fit_to_final
from goc_deploy.runtime.calibration.stepper import Stepper, load_stepper
from goc_deploy.runtime.calibration.trajectory import Trajectory
from goc_deploy.runtime.noise import image_noise
from goc_deploy.runtime.request import Request
from goc_deploy.samplers import SamplerTable
from goc_deploy.schedule import COMPUTE, Schedule, check_schedule
from goc_deploy.spec import ModelSpec

TINY = np.finfo(np.float64).tiny
# Memory for the features of a batch, and the same for mean features; larger means are in a file.
BUDGET_BYTES = 2**30


class EngineCalibrator:
    """A `goc_deploy.policies.calibration.Calibrator` that runs images through a stepper.

    The calibration images run without cache once, when they are first needed, batch by batch. Apart
    from their final latents, memory does not grow with the number of images.

    Args:
        stepper: the engines and the sampler.
        options: number, seed and guidance of the images.
        provenance: provenance of the engine directory, for `describe`.
        progress: called with (what, done, total).
        budget_bytes: memory for the features of a batch, which limits the size of batches, and for
            the mean features, which are in a temporary file if they are larger.
        aim: the engines in full precision, whose final latents without cache are aimed at; None
            aims at those of ``stepper``.

    Raises:
        UsageError: an option is out of range.
    """

    def __init__(
        self,
        stepper: Stepper,
        options: CalibrationOptions,
        provenance: dict[str, Any],
        progress: Progress = no_progress,
        budget_bytes: int = BUDGET_BYTES,
        aim: Stepper | None = None,
    ) -> None:
        check_options(options)
        self._aim = aim
        self._stepper, self._table, self._options = stepper, stepper.table, options
        self._provenance, self._progress, self._budget_bytes = provenance, progress, budget_bytes
        self._labels = balanced_labels(stepper.spec.choices, options.images, options.seed)
        self._final: list[np.ndarray] = []
        self._statistics: Statistics | None = None
        self._errors: dict[Schedule, float] = {}

    def describe(self) -> dict[str, Any]:
        """See `goc_deploy.policies.calibration.Calibrator.describe`."""
        return {
            **asdict(self._options),
            "sampler": self._table.sampler,
            "steps": self._table.steps,
            **self._provenance,
        }

    def statistics(self) -> Statistics:
        """See `goc_deploy.policies.calibration.Calibrator.statistics`.

        Raises:
            VerificationError: results without cache are not finite.
        """
        if self._statistics is None:
            self._statistics = self._without_cache()
        return self._statistics

    def error(self, schedule: Schedule) -> float:
        """See `goc_deploy.policies.calibration.Calibrator.error`.

        The error is infinite if the results are not finite.

        Raises:
            ScheduleError: the schedule is invalid or has another number of steps than the sampler.
            VerificationError: results without cache are not finite.
        """
        check_schedule(schedule)
        if schedule.steps != self._table.steps:
            raise ScheduleError(
                f"the schedule has {schedule.steps} steps but the sampler {self._table.steps}"
            )
        self.statistics()
        if schedule not in self._errors:
            depth = schedule.history_depth
            squares = np.zeros(2)
            with np.errstate(over="ignore", invalid="ignore"):
                for request, expected in zip(self._batches(), self._final, strict=True):
                    trajectory = Trajectory(
                        self._stepper, request, schedule.history, depth, schedule.level
                    )
                    for step, rows in enumerate(schedule.coefficients):
                        trajectory.advance(step, rows)
                        self._progress(f"measuring {schedule.policy}", step, schedule.steps)
                    squares += [np.sum((trajectory.latents - expected) ** 2), np.sum(expected**2)]
            error = math.sqrt(squares[0] / squares[1])
            self._errors[schedule] = error if math.isfinite(error) else math.inf
        return self._errors[schedule]

    def fit(self, schedule: Schedule, options: FitOptions) -> Schedule:
        """See `goc_deploy.policies.calibration.Calibrator.fit`."""
        self.statistics()
        fitted = fit_to_final(
            schedule,
            lambda: self._pairs(schedule, options.entries),
            len(self._final),
            lambda tried: measured_error(self, tried),
            options,
            self._progress,
        )
        record = {**asdict(options), "calibration": self.describe(), "error": self.error(fitted)}
        return replace(fitted, provenance={**schedule.provenance, "fit": record})

    def _pairs(self, schedule: Schedule, depth: int) -> Iterator[Pair]:
        kinds = schedule.history, depth, schedule.level
        for request, expected in zip(self._batches(), self._final, strict=True):
            yield Trajectory(self._stepper, request, *kinds), expected

    def _without_cache(self) -> Statistics:
        spec, steps = self._stepper.spec, self._table.steps
        tokens = max(map(_tokens_of, features_of_units(spec), repeat(spec)))
        means = _zeros((steps, spec.units, tokens, spec.hidden), self._budget_bytes)
        changes = np.zeros((steps, spec.units, MAX_GAP))
        done = rows = 0
        for request in self._batches():
            images = len(request.noise)
            trajectory = Trajectory(self._stepper, request, "computed", 0)
            watcher = _Watcher(means, changes, images)
            for step in range(steps):
                trajectory.advance(step, (COMPUTE,) * spec.units, watcher.at(step))
                self._progress(
                    "calibrating without cache",
                    done * steps + step * images,
                    len(self._labels) * steps,
                )
            if not np.isfinite(trajectory.latents).all():
                raise VerificationError(
                    "calibration without cache results in NaN or infinite latents; check the engine"
                )
            self._final.append(trajectory.latents if self._aim is None else self._aimed(request))
            done += images
            rows += self._stepper.feature_shape[0]
        for step in range(steps):
            means[step] /= rows
        changes /= len(self._labels)
        for gap in range(1, MAX_GAP + 1):
            changes[:gap, :, gap - 1] = np.inf
        return Statistics(means, changes)

    def _aimed(self, request: Request) -> np.ndarray:
        """The final latents of a batch without cache in full precision."""
        assert self._aim is not None
        trajectory = Trajectory(self._aim, request, "computed", 0)
        for step in range(self._table.steps):
            trajectory.advance(step, (COMPUTE,) * self._aim.spec.units)
            self._progress("calibrating in full precision", step, self._table.steps)
        if not np.isfinite(trajectory.latents).all():
            raise VerificationError(
                "images without cache in full precision result in NaN or infinite latents; check "
                "the engine directory in full precision"
            )
        return trajectory.latents

    def _batches(self) -> Iterator[Request]:
        """The calibration images, in the largest batches that the engines and the budget allow."""
        spec = self._stepper.spec
        tokens = sum(map(_tokens_of, features_of_units(spec), repeat(spec)))
        image_bytes = 2 * tokens * (MAX_GAP + 1) * spec.hidden * 4
        capacity = min(s.capacity for s in (self._stepper, self._aim) if s is not None)
        size = max(1, min(capacity, self._budget_bytes // image_bytes))
        return calibration_requests(self._stepper, self._options, size)


def load_calibrator(
    directory: EngineDir,
    backend: Backend,
    table: SamplerTable,
    options: CalibrationOptions,
    progress: Progress,
    full_precision: EngineDir | None = None,
) -> EngineCalibrator:
    """Load an engine directory to calibrate on it.

    Args:
        directory: the engine directory.
        backend: loads the graphs into host memory.
        table: table of the sampler.
        options: the calibration images.
        progress: called with (what, done, total).
        full_precision: the same model, whose images without cache are aimed at; or None.

    Raises:
        UsageError: an option is out of range.
        EngineDirError, SafetyError, EnvironmentUnsupportedError: as in `load_stepper`.
    """
    provenance = directory.manifest.checkpoint_record
    stepper = load_stepper(directory, backend, table, options.images)
    aim = None
    if full_precision is not None:
        aim = load_stepper(full_precision, backend, table, options.images)
        provenance = {**provenance, "aim": FULL_PRECISION}
    return EngineCalibrator(stepper, options, provenance, progress, aim=aim)


def calibration_requests(
    stepper: Stepper, options: CalibrationOptions, size: int
) -> Iterator[Request]:
    """The calibration images in batches.

    Args:
        stepper: what will run them.
        options: number, seed and guidance of the images.
        size: images of a batch.
    """
    spec, table = stepper.spec, stepper.table
    of_images = balanced_labels(spec.choices, options.images, options.seed)
    for first in range(0, len(of_images), size):
        labels = of_images[first : first + size]
        images = range(first, first + len(labels))
        noise = np.stack(
            [image_noise(options.seed, image, table.draws, spec.latents) for image in images]
        )
        conditions = conditions_from_labels(labels, spec, stepper.captions)
        scales = np.full(len(labels), options.cfg_scale)
        yield Request(conditions, noise, scales, options.cfg_channels)


def _tokens_of(features: Sequence[tuple[int, TokenStream]], spec: ModelSpec) -> int:
    """Tokens of all features of a unit."""
    return sum(spec.tokens_of(stream) for _, stream in features)


class _Watcher:
    """Sums up the features of a batch that runs without cache, and their changes."""

    def __init__(self, means: np.ndarray, changes: np.ndarray, images: int) -> None:
        self._means, self._changes, self._images = means, changes, images
        self._earlier: list[list[np.ndarray]] = [[] for _ in range(means.shape[1])]  # newest first

    def at(self, step: int) -> Any:
        """The hook for one step."""
        return lambda unit, feature: self._see(step, unit, feature)

    def _see(self, step: int, unit: int, feature: np.ndarray) -> None:
        feature = np.asarray(feature, np.float32)
        self._means[step, unit, : feature.shape[1]] += feature.sum(axis=0)
        size = self._per_image(np.abs(feature))
        earlier = self._earlier[unit]
        for gap, before in enumerate(earlier):
            change = self._per_image(np.abs(feature - before))
            self._changes[step, unit, gap] += np.sum(change / np.maximum(size, TINY))
        memory = earlier.pop() if len(earlier) == MAX_GAP else np.empty_like(feature)
        memory[...] = feature
        earlier.insert(0, memory)

    def _per_image(self, values: np.ndarray) -> np.ndarray:
        """The sum of (B, T, D) per image, over its conditional and unconditional row: (N,)."""
        summed: np.ndarray = (
            values.sum(axis=(1, 2), dtype=np.float64).reshape(-1, self._images).sum(axis=0)
        )
        return summed


def _zeros(shape: tuple[int, ...], budget_bytes: int) -> np.ndarray:
    """Float32 zeros, in a temporary file if they exceed the budget; it is freed with the array."""
    if math.prod(shape) * 4 <= budget_bytes:
        return np.zeros(shape, np.float32)
    with tempfile.TemporaryFile(prefix="goc-calibration-") as file:
        return np.memmap(file, np.float32, "w+", shape=shape)
