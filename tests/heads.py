"""Plans with heads of random or zero weights, and the trajectory that they should have."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from goc_deploy.api.plans import publish_plan
from goc_deploy.compiler import Plan
from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.host_memory import host_array
from goc_deploy.runtime.pipeline import Pipeline
from goc_deploy.runtime.request import Request
from goc_deploy.samplers.head import Head, HeadForm
from goc_deploy.samplers.head_features import (
    head_correction,
    head_features,
    head_weights,
    normalized,
)
from goc_deploy.spec import ModelSpec

FORMS = {
    form.signature: form
    for form in (
        HeadForm("scalar", 2),
        HeadForm("patch", 3),
        HeadForm("patch", 0, 0, scaled=True),
        HeadForm("hidden", 1),
        HeadForm("hidden", 3, 2),
        HeadForm("hidden", 2, 1, scaled=True),
        HeadForm("squares", 2, 1),
    )
}
Pair = tuple[np.ndarray, np.ndarray]


def head_of(form: HeadForm, spec: ModelSpec, steps: int, strength: float = 0.3) -> Head:
    """A head of random weights; its correction is about ``strength`` times as large as one."""
    shape = (steps, form.width(spec), form.cell_values(spec))
    weights = np.random.default_rng(3).standard_normal(shape) * strength / shape[1] ** 0.5
    weights /= 4 if form.scaled else 1
    return Head(form, (1.0, 8.0), shape, weights.astype("<f4").tobytes())


def plan_with_head(plan: Plan, form: HeadForm, spec: ModelSpec, strength: float = 0.3) -> Plan:
    """A plan with a head, named after it."""
    head = head_of(form, spec, plan.steps, strength)
    table = replace(plan.sampler, head=head)
    kind = form.signature if strength else f"{form.signature}-zero"
    return replace(plan, name=f"{plan.name}+{kind}", sampler=table)


def add_head(engine: Path, plan: str, form: HeadForm, strength: float = 0.3) -> str:
    """Add a plan with a head to an engine directory, and return its name."""
    directory = EngineDir.open(engine)
    found = plan_with_head(directory.plan(plan), form, directory.manifest.model, strength)
    return publish_plan(directory, found).name


class HeadTrajectory:
    """A trajectory along a plan whose head NumPy applies after each step.

    Args:
        pipe: a pipeline on the host of the plan without the head.
        head: the head.
        request: the images.
    """

    def __init__(self, pipe: Pipeline, head: Head, request: Request) -> None:
        self._plan, self._spec, self._head, self._request = pipe.plan, pipe.spec, head, request
        self._session = pipe.new_session()
        self._outputs: list[Pair] = []  # of computed steps, newest first
        self._tokens: list[Pair] = []

    def run(self) -> np.ndarray:
        """The latents after every step, (T, N, C, H, W)."""
        bound, trajectory = self._session.prepare(self._request), []
        for step, launches in enumerate(bound.steps):
            for launch in (*launches.before, *launches.launches):
                launch.run()
            inputs, latents = launches.end[-1].inputs, host_array(bound.latents[step])
            latents += self._correction(
                step,
                host_array(inputs["latents"]),
                self._sides(host_array(inputs["prediction"])[:, : self._spec.channels]),
                self._sides(normalized(host_array(launches.end[0].inputs["x"]))),
            )
            trajectory.append(latents.copy())
        return np.stack(trajectory)

    def _sides(self, rows: np.ndarray) -> Pair:
        images, scales = len(self._request.cfg_scale), self._request.cfg_scale
        cond = rows[:images].copy()
        if len(rows) == images:
            return cond, cond
        alone = (scales == 1).reshape(-1, *[1] * (rows.ndim - 1))
        return cond, np.where(alone, cond, rows[images:])

    def _correction(self, step: int, latents: np.ndarray, output: Pair, tokens: Pair) -> np.ndarray:
        form = self._head.form
        outputs = [output, *self._outputs[: form.outputs]]
        of_tokens = [tokens, *self._tokens[: form.tokens]] if form.reads_tokens else []
        if self._plan.step_kind(step) != "collapsed":
            self._outputs.insert(0, output)
            self._tokens.insert(0, tokens)
        scales = self._request.cfg_scale
        z = head_features(form, self._spec, latents, outputs, of_tokens, scales)
        return head_correction(head_weights(self._head)[step], z, form, self._spec)
