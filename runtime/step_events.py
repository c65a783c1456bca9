"""Telling a caller about each step while a request runs."""

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
    """What a callback is told after each step.

    Attributes:
        step: 0 .. T-1.
        steps: T.
        kind: ``full``, ``collapsed`` or ``mixed``.
        first_image: index of the batch's first image in the request.
        images: images of the batch.
    """

    step: int
    steps: int
    kind: str
    first_image: int
    images: int


def step_callback(
    plan: Plan, hook: StepHook | None, taken: list[np.ndarray] | None, part: range
) -> StepCallback:
    """What a session calls after each step of a batch.

    Args:
        plan: what runs.
        hook: told about the step; an exception in it is logged.
        taken: where to append a copy of the latents, if not None.
        part: the images of the batch.
    """

    def on_step(step: int, latents: Callable[[], np.ndarray]) -> None:
        check_not_exiting()
        if taken is not None:
            taken.append(latents())
        if hook is None:
            return
        event = StepEvent(step, plan.steps, plan.step_kind(step), part.start, len(part))
        with code_of_the_caller():
            try:
                hook(event)
            except Exception:
                logger.exception("the callback failed at step %d; the run goes on", step)

    return on_step
