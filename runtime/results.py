"""The result of a pipeline: images, latents, and a report of the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from goc_deploy.compiler import Plan
from goc_deploy.errors import UsageError, VerificationError
from goc_deploy.precision import ITEM_BYTES, Precision
from goc_deploy.runtime.buffers import planned_bytes
from goc_deploy.runtime.images import pil_images
from goc_deploy.runtime.session import Timing
from goc_deploy.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Result:
    """The result of `Pipeline.generate`.

    Attributes:
        images: (N, H, W, channels) uint8, or (N, F, H, W, channels) of videos; None if the latents
            need a decoder that the engine directory does not have. An image with an error is black.
        latents: (N, C, H, W) float32, or (N, C, F, H, W) of videos.
        trajectory: (T, N, C, H, W) float32, latents after each step, or None if not requested.
        report: timings, plan, memory and versions, in JSON types.
        errors: the error of each image that has one, by its index; empty unless `Pipeline.generate`
            was called with ``on_nonfinite="mark"``.
    """

    images: np.ndarray | None
    latents: np.ndarray
    trajectory: np.ndarray | None
    report: dict[str, Any]
    errors: Mapping[int, VerificationError] = field(default_factory=dict)

    def pil(self) -> list[Image.Image]:
        """Convert the images to Pillow images, of mode ``L`` if they are gray, else ``RGB``.

        Raises:
            UsageError: the result has no images, or has videos.
        """
        if self.images is None:
            raise UsageError(
                "the result has latents but no images; leave out decode=False, or export the "
                "model with its decoder (`vae`)"
            )
        if self.images.ndim == 5:
            raise UsageError(
                "the result has videos, which are no Pillow images; take the frames of one, or "
                "write it with goc_deploy.runtime.video_files.write_video"
            )
        return pil_images(self.images)


@dataclass(slots=True)
class Drawn:
    """The results of the batches that have run.

    Attributes:
        batches: final latents of each batch, (N, C, H, W) float32.
        timings: timing of each batch.
        trajectories: latents after each step of each batch; empty if not requested.
    """

    batches: list[np.ndarray] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)
    trajectories: list[list[np.ndarray]] = field(default_factory=list)

    def latents(self) -> np.ndarray:
        """Final latents of all images, (N, C, H, W) float32."""
        return np.concatenate(self.batches)

    def trajectory(self) -> np.ndarray:
        """(T, N, C, H, W), latents of all images after each step."""
        return np.concatenate([np.stack(steps) for steps in self.trajectories], axis=1)


def errors_of(latents: np.ndarray) -> dict[int, VerificationError]:
    """The error of each image whose latents are not finite, by its index.

    Args:
        latents: (N, C, H, W), or (N, C, F, H, W) of videos.
    """
    finite = np.isfinite(latents).reshape(len(latents), -1).all(axis=1)
    return {
        int(image): VerificationError(
            f"the latents of image {image} are not finite; use a milder plan or `precision=fp32`"
        )
        for image in np.flatnonzero(~finite)
    }


def plan_report(
    plan: Plan, spec: ModelSpec, precision: Precision, batch_size: int
) -> dict[str, Any]:
    """Report entries about a plan, and about its memory for a batch of the largest samples."""
    spec, rows, item = spec.largest, spec.rows_per_image * batch_size, ITEM_BYTES[precision]
    return {
        "plan": plan.name,
        "plan_form": plan.form,
        "plan_form_reason": plan.form_reason,
        "policy": plan.schedule.policy,
        "sampler": plan.sampler.sampler,
        "prediction_type": plan.sampler.prediction_type,
        "steps": plan.steps,
        "step_kinds": plan.kind_counts,
        "computed_units": plan.schedule.computed,
        "all_units": plan.steps * spec.units,
        "precision": precision,
        "batch_size": batch_size,
        "cache_bytes": plan.cache_bytes(spec, rows, item),
        "naive_cache_bytes": plan.naive_cache_bytes(spec, rows, item),
        "buffer_bytes": planned_bytes(spec, precision, plan, batch_size),
    }


def size_report(latents: Sequence[int], spec: ModelSpec, pixels: int) -> dict[str, Any]:
    """Report entries about the size of a sample: width and height, and frames of a video.

    Args:
        latents: shape of the latents of a sample, (C, H, W), or (C, F, H, W) of a video.
        spec: sizes of the model.
        pixels: pixels per latent pixel and side.
    """
    _, *frames, height, width = latents
    report: dict[str, Any] = {"size": [width * pixels, height * pixels]}
    if frames:
        report["frames"] = 1 + (frames[0] - 1) * spec.vae_frames
    return report


def timing_report(plan: Plan, timings: Sequence[Timing]) -> dict[str, Any]:
    """Report entries about the milliseconds of a request, and of every step of every batch."""
    batches = [
        {
            "prepare_ms": timing.prepare_ms,
            "steps": [
                {"step": step, "kind": plan.step_kind(step), "ms": ms}
                for step, ms in enumerate(timing.step_ms)
            ],
        }
        for timing in timings
    ]
    total_ms = sum(timing.prepare_ms + sum(timing.step_ms) for timing in timings)
    return {"total_ms": total_ms, "batches": batches}
