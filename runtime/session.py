"""One set of buffers and the step loop.

Everything is decided before the loop: which engine runs on which addresses. The loop calls functions in order, knows
no policy, allocates nothing and reads nothing back.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from goc_deploy.captions import Conditions
from goc_deploy.plan import Plan
from goc_deploy.protocols import Backend, Buffer
from goc_deploy.runtime.binding import Batch, Binder, BoundLaunch, BoundPlan, Engines
from goc_deploy.runtime.buffers import allocate_buffers
from goc_deploy.spec import ModelSpec
from goc_deploy.trace import Span, recorded

MAX_BOUND_SHAPES = 8

StepCallback = Callable[[int, Buffer], None]


@dataclass(frozen=True, slots=True)
class Request:
    """Inputs of one run.

    Attributes:
        conditions: what each image shows.
        noise: (N, draws, C, H, W) float32: x_T, then one tensor for each step where the sampler is stochastic.
        cfg_scale: guidance scale; 1 runs without unconditional rows.
        cfg_channels: guidance acts on channels 0 .. cfg_channels - 1.
    """

    conditions: Conditions
    noise: np.ndarray
    cfg_scale: float
    cfg_channels: int


@dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds of a run: preparing the inputs, then each step."""

    prepare_ms: float
    step_ms: tuple[float, ...]


def _run_recorded(launches: Sequence[BoundLaunch], step: str, spans: list[Span]) -> None:
    with recorded(spans, "step", step):
        for launch in launches:
            with recorded(spans, "launch", launch.name):
                launch.run()


class Session:
    """Buffers for one plan and up to ``capacity`` images; runs one request at a time."""

    def __init__(
        self, engines: Engines, backend: Backend, spec: ModelSpec, precision: str, plan: Plan, capacity: int
    ) -> None:
        self._engines, self._backend, self._spec, self._plan = engines, backend, spec, plan
        self._buffers = allocate_buffers(backend, spec, precision, plan, capacity)
        self._bound: OrderedDict[Batch, BoundPlan] = OrderedDict()

    def run(
        self, request: Request, on_step: StepCallback | None = None, spans: list[Span] | None = None
    ) -> tuple[np.ndarray, Timing]:
        """Run the step loop.

        Args:
            request: labels, noise, guidance.
            on_step: called after every step with (step, latents), outside the timed part.
            spans: where to record what ran when; it costs about a microsecond per launch.

        Returns:
            Final latents (N, C, H, W) float32, and the timing.
        """
        started = time.perf_counter()
        with recorded(spans, "prepare", "prepare"):
            bound = self._prepare(request)
        prepare_ms = 1e3 * (time.perf_counter() - started)
        step_ms = []
        for step, launches in enumerate(bound.launches):
            started = time.perf_counter()
            if spans is None:
                for launch in launches:
                    launch.run()
            else:
                _run_recorded(launches, f"step {step} ({self._plan.step_kind(step)})", spans)
            step_ms.append(1e3 * (time.perf_counter() - started))
            if on_step:
                on_step(step, bound.latents[step + 1])
        return self._backend.download(bound.latents[-1]), Timing(prepare_ms, tuple(step_ms))

    def _prepare(self, request: Request) -> BoundPlan:
        """Bind the plan for the request's shape and upload the inputs."""
        spec, buffers, upload = self._spec, self._buffers, self._backend.upload
        conditions, images = request.conditions, len(request.conditions.labels)
        guided = request.cfg_scale != 1 and request.cfg_channels > 0
        wanted = [*conditions.labels, *(conditions.nulls if guided else ())]
        distinct = sorted(set(wanted))
        index = np.searchsorted(distinct, wanted)
        captions = conditions.captions
        batch = Batch(images, guided, len(distinct)) if captions is None else Batch(images, guided, 1, len(distinct))
        bound = self.bind(batch)
        own = np.arange(images)
        guidance = np.where(np.arange(spec.channels) < request.cfg_channels, request.cfg_scale, 1.0)
        if captions is None:
            upload(np.asarray(distinct), buffers.labels.view(batch.labels))
            upload(index, buffers.label_rows.view(batch.rows))
        else:
            assert buffers.captions is not None
            embeds, bias = captions.embeds[distinct], captions.bias[distinct]
            upload(embeds, buffers.captions.embeds.view(*embeds.shape))
            upload(bias, buffers.captions.bias.view(*bias.shape))
            upload(index, buffers.captions.rows.view(batch.rows))
            upload(np.zeros(batch.rows), buffers.label_rows.view(batch.rows))
        upload(np.resize(own, batch.rows), buffers.rows.view(batch.rows))
        upload(own, buffers.cond_rows.view(images))
        upload(own + batch.rows - images, buffers.uncond_rows.view(images))
        upload(guidance.astype(np.float32), buffers.guidance)
        upload(request.noise[:, 0], bound.latents[0])
        if self._plan.sampler.stochastic:
            for step, target in enumerate(bound.noise):
                upload(request.noise[:, step + 1], target)
        return bound

    def bind(self, batch: Batch) -> BoundPlan:
        """The plan bound for a batch shape; the last few shapes are kept."""
        if batch not in self._bound:
            self._bound[batch] = Binder(self._engines, self._spec, self._plan, self._buffers, batch).bind()
            if len(self._bound) > MAX_BOUND_SHAPES:
                self._bound.popitem(last=False)
        self._bound.move_to_end(batch)
        return self._bound[batch]
