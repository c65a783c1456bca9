"""Fitting a head: all calibration images advance together along the cached trajectory.

At step k every image makes the step without the head. What its latents then miss of those of a
teacher is regressed on the features of the step; the correction is added, and step k + 1 begins.
Each fit thus sees the errors that the steps before it leave. Memory holds one chunk of images; all
else is in the files of `goc_deploy.runtime.calibration.head_work.HeadWork`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from goc_deploy.errors import VerificationError
from goc_deploy.metrics.paired import relative_l2
from goc_deploy.options import Progress
from goc_deploy.runtime.calibration.head_images import HeadImages
from goc_deploy.runtime.calibration.head_step import fit_step
from goc_deploy.runtime.calibration.head_task import HeadTask, chosen
from goc_deploy.runtime.calibration.head_work import HeadWork
from goc_deploy.runtime.calibration.stepper import Stepper
from goc_deploy.runtime.calibration.trajectory import Trajectory
from goc_deploy.runtime.request import Drawing, Request
from goc_deploy.samplers import SamplerTable
from goc_deploy.samplers.head import Head
from goc_deploy.samplers.head_features import cells_from_latents, head_correction
from goc_deploy.schedule import COMPUTE


class HeadFit:
    """Fits the head of a plan.

    Args:
        make_stepper: loads the engines to run a sampler; called again when the sampler changes.
        task: what to fit.
        work: the files of the fit.
        progress: called with (what, done, total).
    """

    def __init__(
        self,
        make_stepper: Callable[[SamplerTable], Stepper],
        task: HeadTask,
        work: HeadWork,
        progress: Progress,
    ) -> None:
        self._make_stepper, self._task, self._work, self._progress = (
            make_stepper,
            task,
            work,
            progress,
        )
        self._stepper = make_stepper(task.teacher.table)
        self._drawing = task.drawing(self._stepper.spec, self._stepper.captions)

    def aim(self) -> None:
        """Run the teacher for the images that it has not made.

        Raises:
            VerificationError: latents are not finite.
            ConflictError, ResourceError: the work folder cannot be written.
        """
        chunks = self._chunks(self._drawing)
        for number, chunk in enumerate(chunks):
            self._progress("head, latents of the teacher", number, len(chunks))
            self._aims(chunk)

    def fit(self) -> None:
        """Fit the steps that are not finished, after `aim`.

        Raises:
            VerificationError, ConflictError, ResourceError: as for `aim`.
        """
        if self._task.table != self._stepper.table:
            del self._stepper  # its weights need not be in memory twice
            self._stepper = self._make_stepper(self._task.table)
        for step in range(self._work.finished, self._task.table.steps):
            self._fit(step)

    def fitted(self) -> tuple[Head, dict[str, Any]]:
        """Fit the steps that are not finished, and judge the head.

        Returns:
            The head, and its gains per step and held-out errors in plain JSON types.

        Raises:
            VerificationError, ConflictError, ResourceError: as for `aim`.
        """
        task, steps = self._task, range(self._task.table.steps)
        self.aim()
        self.fit()
        fits = self._work.fits()
        weights = np.stack([weights for weights, _ in fits]).astype("<f4")
        features, values = weights.shape[1:]
        shape = (len(steps), features, values)
        head = Head(task.form, task.cfg_scales, shape, weights.tobytes())
        gains = [{"step": step, **record} for step, (_, record) in enumerate(fits)]
        return head, {**self._judged(), "by_step": gains}

    def errors(self) -> np.ndarray:
        """The relative errors of the latents that `fit` ended with, (N,), of all images."""
        aims = np.concatenate([self._aims(chunk)[:, -1] for chunk in self._chunks(self._drawing)])
        return relative_l2(self._work.latents(self._task.table.steps), aims)

    def _chunks(self, drawing: Drawing) -> list[range]:
        """The images in the largest batches that the engines allow."""
        size, images = self._stepper.capacity, len(drawing)
        return [range(first, min(first + size, images)) for first in range(0, images, size)]

    def _request(self, drawing: Drawing, chunk: range) -> Request:
        return drawing.request(chunk, 1)

    def _aims(self, chunk: range) -> np.ndarray:
        """The latents that each step of a chunk aims at, (N, T, C, H, W)."""
        teacher, stepper = self._task.teacher, self._stepper

        def run() -> np.ndarray:
            trajectory = Trajectory(stepper, self._request(self._drawing, chunk), "computed", 0)
            kept = []
            for step in range(teacher.table.steps):
                trajectory.advance(step, (COMPUTE,) * stepper.spec.units)
                if step + 1 in teacher.places:
                    kept.append(trajectory.latents)
            return _finite(np.stack(kept, axis=1), "the teacher, which computes everything,")

        return self._work.teacher(chunk, run)

    def _fit(self, step: int) -> None:
        """Run a step for all images, fit its weights, and add the correction."""
        task, spec, work = self._task, self._stepper.spec, self._work
        images, form, chunks = task.images, task.form, self._chunks(self._drawing)
        latents = np.empty((images, *spec.latents), np.float32)
        sizes, values = np.empty(images), form.cell_values(spec)
        cells = latents[0].size // values
        features = work.scratch("features", (images, cells, form.width(spec)))
        targets = work.scratch("targets", (images, cells, values))
        job = f"head, step {step + 1} of {task.table.steps}"
        for number, chunk in enumerate(chunks):
            self._progress(job, number, len(chunks))
            part, batch = slice(chunk.start, chunk.stop), self._images(step, chunk)
            aims = self._aims(chunk)[:, step]
            features[part] = batch.advance(step)
            latents[part] = batch.trajectory.latents
            targets[part] = cells_from_latents(aims - latents[part], form, spec)
            sizes[part] = _norms(aims)
            if step + 1 < task.table.steps:
                work.save_state(step + 1, chunk, batch.state())
        _finite(latents, f"the plan diverges: step {step}")
        self._progress(job, len(chunks), len(chunks))
        seen = slice(images - task.judges)
        fit = fit_step(features[seen], targets[seen], sizes[seen], task.held_out[seen])
        for chunk in chunks if fit.penalty else []:
            part = slice(chunk.start, chunk.stop)
            latents[part] += head_correction(fit.weights, features[part], form, spec)
        work.finish(step, latents, fit)

    def _images(self, step: int, chunk: range) -> HeadImages:
        """A chunk before a step."""
        task, request = self._task, self._request(self._drawing, chunk)
        images = HeadImages(self._stepper, request, task.schedule, task.form)
        if step:
            images.restore(self._work.state(step, chunk))
            images.trajectory.latents = self._work.latents(step)[chunk.start : chunk.stop]
        return images

    def _judged(self) -> dict[str, Any]:
        """The held-out error of the final latents to the teacher's, with and without the head."""
        task = self._task
        aims = np.concatenate([self._aims(chunk)[:, -1] for chunk in self._chunks(self._drawing)])
        with_head = self._work.latents(task.table.steps)[task.held_out]
        without, drawing = [], chosen(self._drawing, task.held_out)
        chunks = self._chunks(drawing)
        for number, chunk in enumerate(chunks):
            self._progress("head, the plan without it", number, len(chunks))
            request = self._request(drawing, chunk)
            batch = HeadImages(self._stepper, request, task.schedule, task.form)
            for step in range(task.table.steps):
                batch.advance(step)
            without.append(batch.trajectory.latents)
        aimed = aims[task.held_out]
        plain, corrected = (
            relative_l2(latents, aimed) for latents in (np.concatenate(without), with_head)
        )
        return {
            "held_out_images": len(aimed),
            "held_out_error": float(corrected.mean()),
            "held_out_median": float(np.median(corrected)),
            "held_out_error_without": float(plain.mean()),
            "held_out_median_without": float(np.median(plain)),
        }


def _norms(latents: np.ndarray) -> np.ndarray:
    """Euclidean norm of each image, (N,) float64."""
    return np.asarray(np.sqrt(np.square(latents, dtype=np.float64).sum(axis=(1, 2, 3))))


def _finite(latents: np.ndarray, what: str) -> np.ndarray:
    if not np.isfinite(latents).all():
        raise VerificationError(f"{what} results in NaN or infinite latents; check the engine")
    return latents
