"""One call of a pipeline: the runs of its batches on a session, then the result."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from goc_deploy.cancellation import CallLimits
from goc_deploy.compiler import Plan
from goc_deploy.runtime.decoder import LatentDecoder
from goc_deploy.runtime.images import images_from_latents
from goc_deploy.runtime.interpreter_exit import native_calls
from goc_deploy.runtime.request import Drawing
from goc_deploy.runtime.results import Drawn, Result, errors_of, timing_report
from goc_deploy.runtime.session import Session
from goc_deploy.runtime.step_events import StepHook, step_callback
from goc_deploy.runtime.video_decoder import VideoDecoder
from goc_deploy.trace import Span, recorded

OnNonfinite = Literal["raise", "mark"]


@dataclass(frozen=True, slots=True)
class Extras:
    """What a call wants besides its images.

    Attributes:
        trajectory: whether the latents after every step are returned too.
        decode: whether latents are decoded to images, if there is a decoder.
        callback: called after every step, or None.
        spans: list to which the times of all parts are appended, or None.
        limits: what may end the call early, or None.
        on_nonfinite: what happens if the latents of an image are not finite: ``raise`` an error, or
            ``mark`` the image in the result.
    """

    trajectory: bool = False
    decode: bool = True
    callback: StepHook | None = None
    spans: list[Span] | None = None
    limits: CallLimits | None = None
    on_nonfinite: OnNonfinite = "raise"


@dataclass(slots=True)
class Generation:
    """A call while it runs.

    Attributes:
        plan: the plan that runs.
        drawing: all images of the call.
        batch_size: images per run.
        decoder: the decoder of the latents, or None.
        extras: what the call wants besides its images.
    """

    plan: Plan
    drawing: Drawing
    batch_size: int
    decoder: LatentDecoder | VideoDecoder | None
    extras: Extras
    _drawn: Drawn = field(default_factory=Drawn)

    def run(self, session: Session) -> None:
        """Run every batch on a session."""
        extras, drawn, draws = self.extras, self._drawn, self.plan.sampler.draws
        for first in range(0, len(self.drawing), self.batch_size):
            part = range(first, min(first + self.batch_size, len(self.drawing)))
            trajectory: list[np.ndarray] = []
            on_step = None
            if extras.callback is not None or extras.trajectory or session.on_cpu:
                # Otherwise nothing is called between steps, because a run on a GPU is short.
                kept = trajectory if extras.trajectory else None
                on_step = step_callback(self.plan, extras.callback, kept, part, self._decoded)
            request = self.drawing.request(part, draws)
            final, timing = session.run(request, on_step, extras.spans, extras.limits)
            drawn.batches.append(final)
            drawn.timings.append(timing)
            drawn.trajectories.append(trajectory)

    def result(self, report: Mapping[str, Any]) -> Result:
        """Decode the latents.

        Args:
            report: entries of the report in addition to those about times.

        Raises:
            VerificationError: the latents of an image are not finite, and such images are not
                marked.
            CancelledError, DeadlineError: because of the limits of the call.
        """
        latents, timings = self._drawn.latents(), timing_report(self.plan, self._drawn.timings)
        errors = errors_of(latents)
        if errors and self.extras.on_nonfinite == "raise":
            raise next(iter(errors.values()))
        started = time.perf_counter()
        pictures = self._images(latents, errors) if self.extras.decode else None
        times = {**timings, "decode_ms": 1e3 * (time.perf_counter() - started)}
        whole = self._drawn.trajectory() if self.extras.trajectory else None
        return Result(pictures, latents, whole, {**report, **times}, errors)

    def _images(self, latents: np.ndarray, errors: Collection[int]) -> np.ndarray | None:
        """Convert or decode latents; images with errors are black."""
        bad = list(errors)
        if bad:
            latents = latents.copy()
            latents[bad] = 0
        with recorded(self.extras.spans, "decode", f"decode {len(latents)} images"):
            pictures = self._decoded(latents)
        if bad and pictures is not None:
            pictures[bad] = 0
        return pictures

    def _decoded(self, latents: np.ndarray) -> np.ndarray | None:
        if self.decoder is None:
            return images_from_latents(latents)
        with native_calls():
            return self.decoder.images(latents, self.extras.limits)
