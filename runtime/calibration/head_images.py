"""A batch of images on the cached trajectory, with all that a head reads of earlier steps."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from goc_deploy.policies.head import computed_steps
from goc_deploy.runtime.calibration.stepper import Stepper
from goc_deploy.runtime.calibration.trajectory import Trajectory, numbered
from goc_deploy.runtime.request import Request
from goc_deploy.samplers.head import HeadForm
from goc_deploy.samplers.head_features import head_features, normalized
from goc_deploy.schedule import Schedule

Pair = tuple[np.ndarray, np.ndarray]  # of the conditional and the unconditional row


class HeadImages:
    """A batch that advances step by step; its caller adds the correction of the head.

    Args:
        stepper: runs the units.
        request: the images.
        schedule: what each step computes.
        form: what the head reads.
    """

    def __init__(
        self, stepper: Stepper, request: Request, schedule: Schedule, form: HeadForm
    ) -> None:
        self._stepper, self._request, self._schedule, self._form = stepper, request, schedule, form
        self._computed = frozenset(computed_steps(schedule))
        depth = schedule.history_depth
        self.trajectory = Trajectory(stepper, request, schedule.history, depth, schedule.level)
        self._outputs: list[Pair] = []  # of computed steps, newest first, as the next
        self._tokens: list[Pair] = []

    def advance(self, step: int) -> np.ndarray:
        """Run one step without the head.

        Returns:
            The features of the step, (N, cells, F) float32.
        """
        latents, form, stepper = self.trajectory.latents, self._form, self._stepper
        self.trajectory.advance(step, self._schedule.coefficients[step])
        outputs = [stepper.model_output(), *self._outputs]
        tokens = self._tokens
        if form.reads_tokens:
            cond, uncond = stepper.final_tokens()
            tokens = [(normalized(cond), normalized(uncond)), *tokens]
        scales = self._request.cfg_scale
        features = head_features(form, stepper.spec, latents, outputs, tokens, scales)
        if step in self._computed:
            self._outputs, self._tokens = outputs[: form.outputs], tokens[: form.tokens]
        return features

    def state(self) -> dict[str, np.ndarray]:
        """Everything that later steps read, by name."""
        state = self.trajectory.state()
        for name, pairs in (("output", self._outputs), ("tokens", self._tokens)):
            state |= {f"{name} {i}": np.stack(pair) for i, pair in enumerate(pairs)}
        return state

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Continue from a `state` of the same images."""
        self.trajectory.restore(state)
        self._outputs = [(both[0], both[1]) for both in numbered(state, "output")]
        self._tokens = [(both[0], both[1]) for both in numbered(state, "tokens")]
