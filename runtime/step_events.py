"""Notifying a caller of each step while a request runs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from goc_deploy.compiler import Plan
from goc_deploy.runtime.interpreter_exit import check_not_exiting, code_of_the_caller
from goc_deploy.runtime.session import StepCallback

logger = logging.getLogger(__name__)

StepHook = Callable[["StepEvent"], None]


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


def step_callback(
    plan: Plan, hook: StepHook | None, trajectory: list[np.ndarray] | None, part: range
) -> StepCallback:
    """The function that a session calls after each step of a batch.

    Args:
        plan: the plan that runs.
        hook: called with the event of the step; an exception in it is logged.
        trajectory: list to which a copy of the latents is appended, or None.
        part: the images of the batch.
    """

    def on_step(step: int, latents: Callable[[], np.ndarray]) -> None:
        check_not_exiting()
        if trajectory is not None:
            trajectory.append(latents())
        if hook is None:
            return
        event = StepEvent(step, plan.steps, plan.step_kind(step), part.start, len(part))
        with code_of_the_caller():
            try:
                hook(event)
            except Exception:
                logger.exception("the callback failed at step %d; the run goes on", step)

    return on_step
