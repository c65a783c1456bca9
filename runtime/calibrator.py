"""Calibration on an engine directory: images without cache, their statistics, and schedules measured against them."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from goc_deploy.conditions.labels import balanced_labels
from goc_deploy.errors import ResourceError, ScheduleError, VerificationError
from goc_deploy.host_memory import available_bytes
from goc_deploy.noise import image_noise
from goc_deploy.options import Progress, no_progress
from goc_deploy.policies.calibration import (
    MAX_GAP,
    CalibrationOptions,
    Statistics,
    check_options,
    measured_error,
)
from goc_deploy.policies.least_squares import FitOptions
from goc_deploy.runtime.final_fit import Pair, fit_to_final
from goc_deploy.runtime.fitting import fitted_schedule
from goc_deploy.runtime.stepper import Stepper
from goc_deploy.runtime.trajectory import ImageBatch, Trajectory
from goc_deploy.schedule import COMPUTE, Schedule, check_schedule

TINY = np.finfo(np.float64).tiny
BUDGET_BYTES = (
    2**30
)  # for features of a batch in memory, and again for mean features; beyond it these lie in a file


class EngineCalibrator:
    """Answers policies by running calibration images through a stepper. Implements `goc_deploy.policies.calibration.Calibrator`.

    The images without cache run once, when first needed, batch by batch: memory does not grow with their number, but
    for the final latents.

    Args:
        stepper: the engine and its sampler.
        options: which images.
        provenance: of the engine, for `describe`.
        progress: called with (what, done, total).

    Raises:
        UsageError: an option out of range.
    """

    def __init__(
        self,
        stepper: Stepper,
        options: CalibrationOptions,
        provenance: dict[str, Any],
        progress: Progress = no_progress,
    ) -> None:
        check_options(options)
        self._stepper, self._table, self._options = stepper, stepper.table, options
        self._provenance, self._progress = provenance, progress
        self._labels = balanced_labels(stepper.spec.classes, options.images, options.seed)
        self._final: list[np.ndarray] = []
        self._statistics: Statistics | None = None
        self._errors: dict[Schedule, float] = {}

    def describe(self) -> dict[str, Any]:
        """See `goc_deploy.policies.calibration.Calibrator.describe`."""
        options = self._options
        return {
            "images": options.images,
            "seed": options.seed,
            "cfg_scale": options.cfg_scale,
            "cfg_channels": options.cfg_channels,
            "sampler": self._table.sampler,
            "steps": self._table.steps,
            **self._provenance,
        }

    def statistics(self) -> Statistics:
        """See `goc_deploy.policies.calibration.Calibrator.statistics`.

        Raises:
            VerificationError: the model's results without cache are not finite.
        """
        if self._statistics is None:
            self._statistics = self._without_cache()
        return self._statistics

    def error(self, schedule: Schedule) -> float:
        """See `goc_deploy.policies.calibration.Calibrator.error`. Infinite where the results are not finite."""
        check_schedule(schedule)
        if schedule.steps != self._table.steps:
            raise ScheduleError(
                f"the schedule has {schedule.steps} steps but the sampler {self._table.steps}"
            )
        self.statistics()
        if schedule not in self._errors:
            depth = max(len(row) for step in schedule.coefficients for row in step)
            squares = np.zeros(2)
            with np.errstate(over="ignore", invalid="ignore"):
                for batch, expected in zip(self._batches(), self._final, strict=True):
                    trajectory = Trajectory(self._stepper, batch, schedule.history, depth)
                    for step, rows in enumerate(schedule.coefficients):
                        trajectory.advance(step, rows)
                        self._progress(f"measuring {schedule.policy}", step, schedule.steps)
                    squares += [np.sum((trajectory.latents - expected) ** 2), np.sum(expected**2)]
            error = math.sqrt(squares[0] / squares[1])
            self._errors[schedule] = error if math.isfinite(error) else math.inf
        return self._errors[schedule]

    def fit(self, schedule: Schedule, options: FitOptions) -> Schedule:
        """See `goc_deploy.policies.calibration.Calibrator.fit`. With target ``feature`` the history of all images is kept.

        Raises:
            ResourceError: the history does not fit into memory.
        """
        if options.target == "final":
            fitted = fit_to_final(
                schedule,
                lambda: self._pairs(schedule.history, options.entries),
                lambda tried: measured_error(self, tried),
                options,
                self._progress,
            )
        else:
            candidate = fitted_schedule(
                schedule, self._all_trajectories(schedule, options), options, self._progress
            )
            fitted = min(
                schedule, candidate, key=lambda tried: measured_error(self, tried)
            )  # the sums may mislead
        record = {**asdict(options), "calibration": self.describe(), "error": self.error(fitted)}
        return replace(fitted, provenance={**schedule.provenance, "fit": record})

    def _pairs(self, history: str, depth: int) -> Iterator[Pair]:
        self.statistics()
        for batch, expected in zip(self._batches(), self._final, strict=True):
            yield Trajectory(self._stepper, batch, history, depth), expected

    def _all_trajectories(self, schedule: Schedule, options: FitOptions) -> list[Trajectory]:
        spec, images = self._stepper.spec, len(self._labels)
        needed = 2 * images * spec.units * options.entries * spec.tokens * spec.hidden * 4
        available = available_bytes()
        if available is not None and needed > 0.8 * available:
            raise ResourceError(
                f"fitting keeps the history of {images} images, {needed / 1e9:.1f} GB, but {available / 1e9:.1f} GB are "
                "available; use fewer images (`calibrate`) or history entries"
            )
        return [
            Trajectory(self._stepper, batch, schedule.history, options.entries)
            for batch in self._batches()
        ]

    def _without_cache(self) -> Statistics:
        spec, steps = self._stepper.spec, self._table.steps
        means = _zeros((steps, spec.units, spec.tokens, spec.hidden))
        changes = np.zeros((steps, spec.units, MAX_GAP))
        done = rows = 0
        for batch in self._batches():
            trajectory = Trajectory(self._stepper, batch, "computed", 0)
            watcher = _Watcher(means, changes, len(batch.labels))
            for step in range(steps):
                trajectory.advance(step, (COMPUTE,) * spec.units, watcher.at(step))
                self._progress(
                    "calibrating without cache",
                    done * steps + step * len(batch.labels),
                    len(self._labels) * steps,
                )
            if not np.isfinite(trajectory.latents).all():
                raise VerificationError(
                    "calibration without cache gives NaN or infinite latents; check the engine"
                )
            self._final.append(trajectory.latents)
            done += len(batch.labels)
            rows += self._stepper.feature_shape[0]
        for step in range(steps):
            means[step] /= rows
        changes /= len(self._labels)
        for gap in range(1, MAX_GAP + 1):
            changes[:gap, :, gap - 1] = np.inf
        return Statistics(means, changes)

    def _batches(self) -> Iterator[ImageBatch]:
        """The calibration images; a batch is as large as the engine and the budget for features allow."""
        spec, options = self._stepper.spec, self._options
        image_bytes = 2 * spec.units * (MAX_GAP + 1) * spec.tokens * spec.hidden * 4
        size = max(1, min(self._stepper.capacity, BUDGET_BYTES // image_bytes))
        draws = 1 + (self._table.steps if self._table.stochastic else 0)
        for first in range(0, len(self._labels), size):
            labels = self._labels[first : first + size]
            images = range(first, first + len(labels))
            shape = (spec.channels, spec.side, spec.side)
            noise = np.stack([image_noise(options.seed, image, draws, shape) for image in images])
            yield ImageBatch(labels, noise, options.cfg_scale, options.cfg_channels)


class _Watcher:
    """Sums up features and their changes as a batch passes without cache."""

    def __init__(self, means: np.ndarray, changes: np.ndarray, images: int) -> None:
        self._means, self._changes, self._images = means, changes, images
        self._earlier: list[list[np.ndarray]] = [[] for _ in range(means.shape[1])]  # newest first

    def at(self, step: int) -> Any:
        """The hook of one step."""
        return lambda unit, feature: self._see(step, unit, feature)

    def _see(self, step: int, unit: int, feature: np.ndarray) -> None:
        feature = np.asarray(feature, np.float32)
        self._means[step, unit] += feature.sum(axis=0)
        size = self._per_image(np.abs(feature))
        earlier = self._earlier[unit]
        for gap, before in enumerate(earlier):
            change = self._per_image(np.abs(feature - before))
            self._changes[step, unit, gap] += np.sum(change / np.maximum(size, TINY))
        memory = earlier.pop() if len(earlier) == MAX_GAP else np.empty_like(feature)
        memory[...] = feature
        earlier.insert(0, memory)

    def _per_image(self, values: np.ndarray) -> np.ndarray:
        """(B, T, D) summed up per image, over its conditional and unconditional row."""
        summed: np.ndarray = (
            values.sum(axis=(1, 2), dtype=np.float64).reshape(-1, self._images).sum(axis=0)
        )
        return summed


def _zeros(shape: tuple[int, ...]) -> np.ndarray:
    """Float32 zeros, in a temporary file where they are beyond the budget; the file goes with the array."""
    if math.prod(shape) * 4 <= BUDGET_BYTES:
        return np.zeros(shape, np.float32)
    with tempfile.TemporaryFile(prefix="goc-calibration-") as file:
        return np.memmap(file, np.float32, "w+", shape=shape)
