"""Notifying a caller of each step while a request runs, with previews if it asks for them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from goc_deploy.compiler import Plan
from goc_deploy.errors import UsageError
from goc_deploy.runtime.interpreter_exit import (
    check_not_exiting,
    code_of_the_caller,
    native_calls,
)
from goc_deploy.runtime.session import StepCallback

logger = logging.getLogger(__name__)

StepHook = Callable[["StepEvent"], None]
ToImages = Callable[[np.ndarray], "np.ndarray | None"]


class StepLatents:
    """The latents of a step, which are copied when they are first read.

    Args:
        read: waits for the latents and returns a copy; valid until `close`.
    """

    def __init__(self, read: Callable[[], np.ndarray]) -> None:
        self._read: Callable[[], np.ndarray] | None = read
        self._copy: np.ndarray | None = None

    def copy(self) -> np.ndarray:
        """Return the latents, (N, C, H, W) float32.

        Raises:
            UsageError: they were not read before `close`.
        """
        if self._copy is None:
            if self._read is None:
                raise UsageError(
                    "the latents of a step are overwritten after the callback; read them in it"
                )
            with native_calls():
                self._copy = self._read()
        return self._copy

    def close(self) -> None:
        """Refuse to read from now on, because the next step overwrites the latents."""
        self._read = None


@dataclass(frozen=True, slots=True)
class StepEvent:
    """The event of a step that has ended.

    Attributes:
        step: index of the step, 0 .. T-1.
        steps: T, number of steps.
        kind: kind of the step: ``full``, ``collapsed`` or ``mixed``.
        first_image: index of the batch's first image in the request.
        images: number of images of the batch.
    """

    step: int
    steps: int
    kind: str
    first_image: int
    images: int
    _latents: StepLatents
    _images: ToImages
    _rows: range | None = None

    def latents(self) -> np.ndarray:
        """Copy the latents after the step; on a GPU this waits for the step.

        Returns:
            (``images``, C, H, W) float32.

        Raises:
            UsageError: the callback has returned.
        """
        latents, rows = self._latents.copy(), self._rows
        return latents.copy() if rows is None else latents[rows.start : rows.stop].copy()

    def preview(self) -> np.ndarray | None:
        """Convert the latents after the step to images, which become less noisy step by step.

        Returns:
            (``images``, H, W, channels) uint8, or None if the latents need a decoder that the
            engine directory does not have.

        Raises:
            UsageError: the callback has returned.
        """
        with native_calls():
            return self._images(self.latents())

    def part(self, images: range, first_image: int = 0) -> StepEvent:
        """The event of some images of the batch.

        Args:
            images: indices in the batch.
            first_image: index of the first of them in their own request.
        """
        return replace(self, first_image=first_image, images=len(images), _rows=images)


def step_callback(
    plan: Plan,
    hook: StepHook | None,
    trajectory: list[np.ndarray] | None,
    part: range,
    to_images: ToImages,
) -> StepCallback:
    """The function that a session calls after each step of a batch.

    Args:
        plan: the plan that runs.
        hook: called with the event of the step; an exception in it is logged.
        trajectory: list to which a copy of the latents is appended, or None.
        part: the images of the batch.
        to_images: makes previews of latents (N, C, H, W) float32.
    """

    def on_step(step: int, read: Callable[[], np.ndarray]) -> None:
        check_not_exiting()
        latents = StepLatents(read)
        if trajectory is not None:
            trajectory.append(latents.copy())
        if hook is None:
            return
        kind = plan.step_kind(step)
        event = StepEvent(step, plan.steps, kind, part.start, len(part), latents, to_images)
        with code_of_the_caller():
            try:
                hook(event)
            except Exception:
                logger.exception("the callback failed at step %d; the run goes on", step)
            finally:
                latents.close()

    return on_step
