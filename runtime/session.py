"""One set of buffers and the step loop.

Everything is decided before the loop: which engine runs on which addresses. The loop calls functions in order, knows
no policy, allocates nothing, waits for nothing and reads nothing back. On a device with graphs, each step is recorded once it
has run for a batch shape, and is one call from then on.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from goc_deploy.compiler import Plan
from goc_deploy.conditions.captions import Conditions
from goc_deploy.precision import Precision
from goc_deploy.protocols import Backend, Launch, Stream
from goc_deploy.runtime.binding import Batch, Binder, BoundLaunch, BoundPlan, BoundStep, Engines
from goc_deploy.runtime.buffers import allocate_buffers
from goc_deploy.runtime.shared_binding import SharedBinder
from goc_deploy.spec import ModelSpec
from goc_deploy.trace import Span, recorded

MAX_BOUND_SHAPES = 8
BEFORE_THE_FIRST_STEP = np.array([-1], np.int32)

StepCallback = Callable[[int, Callable[[], np.ndarray]], None]


@dataclass(frozen=True, slots=True)
class Request:
    """Inputs of one run.

    Attributes:
        conditions: what each image shows.
        noise: (N, draws, C, H, W) float32: x_T, then one tensor for each step where the sampler is stochastic.
        cfg_scale: (N,) guidance scale of each image; where all are 1, there are no unconditional rows.
        cfg_channels: guidance acts on channels 0 .. cfg_channels - 1.
    """

    conditions: Conditions
    noise: np.ndarray
    cfg_scale: np.ndarray
    cfg_channels: int


@dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds of a run: preparing the inputs, then each step on the device."""

    prepare_ms: float
    step_ms: tuple[float, ...]


@dataclass(slots=True)
class _Runnable:
    """A bound plan, and what to call for each step: its launches, and a replay of them once they ran."""

    plan: BoundPlan
    steps: tuple[Sequence[Launch], ...]
    ran: bool = False
    recorded: bool = False


def _runs(launches: Sequence[BoundLaunch]) -> list[Launch]:
    return [launch.run for launch in launches]


def _run_profiled(step: BoundStep, name: str, stream: Stream, spans: list[Span]) -> None:
    """Run a step launch by launch, and wait for each."""
    with recorded(spans, "step", name):
        for launch in (*step.before, *step.launches):
            with recorded(spans, "launch", launch.name):
                launch.run()
                stream.wait()


class Session:
    """Buffers for one plan and up to ``capacity`` images; runs one request at a time."""

    def __init__(
        self,
        engines: Engines,
        backend: Backend,
        spec: ModelSpec,
        precision: Precision,
        plan: Plan,
        capacity: int,
    ) -> None:
        self._engines, self._backend, self._spec, self._plan = engines, backend, spec, plan
        self._stream = backend.stream()
        self._pads_labels = (
            backend.device.shares_launches
        )  # to bind and record a shape costs more than to pad one
        self._buffers = allocate_buffers(backend, spec, precision, plan, capacity)
        self._bound: OrderedDict[Batch, _Runnable] = OrderedDict()

    def run(
        self, request: Request, on_step: StepCallback | None = None, spans: list[Span] | None = None
    ) -> tuple[np.ndarray, Timing]:
        """Run the step loop.

        Args:
            request: labels, noise, guidance.
            on_step: called after every step with the step and a function that waits for its latents and gives a copy,
                outside the timed part.
            spans: where to record what ran when; every launch is then waited for.

        Returns:
            Final latents (N, C, H, W) float32, and the timing.
        """
        with self._stream.held():
            return self._run(request, on_step, spans)

    def _run(
        self, request: Request, on_step: StepCallback | None, spans: list[Span] | None
    ) -> tuple[np.ndarray, Timing]:
        stream, started = self._stream, time.perf_counter()
        with recorded(spans, "prepare", "prepare"):
            runnable = self._prepare(request)
        bound, prepare_ms = runnable.plan, 1e3 * (time.perf_counter() - started)
        for step, launches in enumerate(runnable.steps):
            stream.mark(2 * step)
            if spans is None:
                for launch in launches:
                    launch()
            else:
                name = f"step {step} ({self._plan.step_kind(step)})"
                _run_profiled(bound.steps[step], name, stream, spans)
            stream.mark(2 * step + 1)
            if on_step:
                on_step(step, partial(stream.download, bound.latents[step]))
        latents = stream.download(bound.latents[-1])
        marks = stream.marked_ms(2 * self._plan.steps)
        if not runnable.ran:
            runnable.ran = True
            self._backend.keep_compiled()
        step_ms = tuple(
            after - before for before, after in zip(marks[::2], marks[1::2], strict=True)
        )
        return latents, Timing(prepare_ms, step_ms)

    def _prepare(self, request: Request) -> _Runnable:
        """Bind the plan for the request's shape, or record it if it ran before, and upload the inputs."""
        buffers, upload = self._buffers, self._stream.upload
        conditions, images = request.conditions, len(request.conditions.labels)
        guided = request.cfg_channels > 0 and bool((request.cfg_scale != 1).any())
        wanted = [*conditions.labels, *(conditions.nulls if guided else ())]
        distinct = sorted(set(wanted))
        index = np.searchsorted(distinct, wanted)
        if self._pads_labels:
            distinct += distinct[-1:] * (images + guided - len(distinct))
        captions = conditions.captions
        batch = (
            Batch(images, guided, len(distinct))
            if captions is None
            else Batch(images, guided, 1, len(distinct))
        )
        runnable = self.bind(batch)
        if runnable.ran and not runnable.recorded:
            runnable.steps = self._recorded(runnable.plan)
            runnable.recorded = True
        own = np.arange(images)
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
        self._upload_guidance(request, batch)
        upload(np.float32(self._plan.sampler.start) * request.noise[:, 0], runnable.plan.initial)
        if buffers.shared is not None:
            upload(BEFORE_THE_FIRST_STEP, buffers.shared.step)
        for source, target in runnable.plan.resets:
            self._stream.copy(source, target)
        if self._plan.sampler.stochastic:
            for step, target in enumerate(runnable.plan.noise):
                upload(request.noise[:, step + 1], target)
        self._stream.wait()
        return runnable

    def _upload_guidance(self, request: Request, batch: Batch) -> None:
        """Weights, and which rows of the prediction they lie between: for an image of scale 1, one row and itself."""
        buffers, upload, scales, channels = (
            self._buffers,
            self._stream.upload,
            request.cfg_scale,
            self._spec.channels,
        )
        own = np.arange(batch.images)
        guidance = np.where(np.arange(channels) < request.cfg_channels, scales[:, None], 1.0)
        upload(own, buffers.cond_rows.view(batch.images))
        upload(
            np.where(scales == 1, own, own + batch.rows - batch.images),
            buffers.uncond_rows.view(batch.images),
        )
        upload(guidance.astype(np.float32), buffers.guidance.view(batch.images, channels))

    def _recorded(self, plan: BoundPlan) -> tuple[Sequence[Launch], ...]:
        """What to call for each step: steps of the same launches are recorded once."""
        known: dict[tuple[int, ...], Sequence[Launch]] = {}
        found = []
        for step in plan.steps:
            key = tuple(map(id, step.launches))
            if key not in known:
                known[key] = self._stream.recorded(_runs(step.launches))
            found.append([*_runs(step.before), *known[key]])
        return tuple(found)

    def unbind(self) -> tuple[Batch, ...]:
        """Forget engines, which other weights take the place of; returns the shapes that were bound, for `bind_all`."""
        batches = tuple(self._bound)
        self._bound.clear()
        return batches

    def bind_all(self, batches: Sequence[Batch]) -> None:
        """Bind the plan for some shapes."""
        with self._stream.held():
            for batch in batches:
                self.bind(batch)

    def bind(self, batch: Batch) -> _Runnable:
        """The plan bound for a batch shape; the last few shapes are kept."""
        if batch not in self._bound:
            plan = self._binder(batch).bind()
            steps = tuple([*_runs(step.before), *_runs(step.launches)] for step in plan.steps)
            self._bound[batch] = _Runnable(plan, steps)
            if len(self._bound) > MAX_BOUND_SHAPES:
                self._bound.popitem(last=False)
        self._bound.move_to_end(batch)
        return self._bound[batch]

    def _binder(self, batch: Batch) -> Binder:
        args = (self._engines, self._spec, self._plan, self._buffers, batch, self._stream)
        device = self._backend.device
        return SharedBinder(device, *args) if device.shares_launches else Binder(*args)
