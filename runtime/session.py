"""One set of buffers and the step loop.

The engine and the addresses of every launch are fixed before the loop. The loop calls functions in
order, knows no policy, allocates nothing, waits for nothing and reads nothing back. On a device
with CUDA graphs, each step is recorded after it has run for a batch shape, and is one call
afterwards.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from goc_deploy.cancellation import CallLimits
from goc_deploy.compiler import Plan
from goc_deploy.compiler.modulation_file import table_key
from goc_deploy.conditions.references import patches_of
from goc_deploy.errors import GocError
from goc_deploy.precision import Precision
from goc_deploy.protocols import Backend, Run, Stream
from goc_deploy.runtime.binding import Binder
from goc_deploy.runtime.bound import BoundLaunch, BoundPlan, BoundStep
from goc_deploy.runtime.buffers import allocate_buffers
from goc_deploy.runtime.constants import constants_from_plan, timesteps_from_plan
from goc_deploy.runtime.model_engines import Engines
from goc_deploy.runtime.request import Batch, Inputs, Request, prepared
from goc_deploy.runtime.shared_binding import SharedBinder
from goc_deploy.size_inputs import size_tensors
from goc_deploy.spec import ModelSpec
from goc_deploy.trace import Span, recorded

MAX_BOUND_SHAPES = 8
BEFORE_THE_FIRST_STEP = np.array([-1], np.int32)

StepCallback = Callable[[int, Callable[[], np.ndarray]], None]


@dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds of a run: preparing the inputs, then each step on the device."""

    prepare_ms: float
    step_ms: tuple[float, ...]


@dataclass(slots=True)
class _Runnable:
    """A bound plan, and the calls of each step: its launches, or their replay if recorded."""

    plan: BoundPlan
    steps: tuple[Sequence[Run], ...]
    ran: bool = False
    recorded: bool = False


def _runs(launches: Sequence[BoundLaunch]) -> list[Run]:
    return [launch.run for launch in launches]


def _run_profiled(
    step: BoundStep, name: str, stream: Stream, spans: list[Span], limits: CallLimits | None
) -> None:
    """Run a step launch by launch, and wait for each launch."""
    with recorded(spans, "step", name):
        for launch in (*step.before, *step.launches):
            if limits is not None:
                limits.check()
            with recorded(spans, "launch", launch.name):
                launch.run()
                stream.wait()


class Session:
    """Buffers for one plan and up to ``capacity`` images; runs one request at a time.

    Args:
        engines: the engines that the plan launches.
        backend: the backend of the engines.
        spec: sizes of the model.
        precision: precision of the engines.
        plan: the plan to run.
        capacity: the largest number of images N of a request.
        chunk: number of steps for which the modulation table is computed at a time; None for as
            many as its memory budget allows. A stored table always has all steps.

    Attributes:
        buffers: the memory of the session.
    """

    def __init__(
        self,
        engines: Engines,
        backend: Backend,
        spec: ModelSpec,
        precision: Precision,
        plan: Plan,
        capacity: int,
        chunk: int | None = None,
    ) -> None:
        self._engines, self._backend, self._spec, self._plan = engines, backend, spec, plan
        self._stream = backend.stream()
        self._holds_table = engines.holds_table(plan)
        chunk = plan.steps if self._holds_table else chunk
        self.buffers = allocate_buffers(backend, spec.largest, precision, plan, capacity, chunk)
        self._bound: OrderedDict[Batch, _Runnable] = OrderedDict()
        # Of the sample and the references that the buffers were filled for:
        self._axes: tuple[tuple[int, ...], ...] = ()
        self._table_key = ""  # of the modulation table in the buffers

    @property
    def on_cpu(self) -> bool:
        """Whether the launches run on the CPU, so that a launch is done when its call returns."""
        return self._backend.device.kind == "cpu"

    def run(
        self,
        request: Request,
        on_step: StepCallback | None = None,
        spans: list[Span] | None = None,
        limits: CallLimits | None = None,
    ) -> tuple[np.ndarray, Timing]:
        """Run the step loop.

        Args:
            request: labels, noise, guidance.
            on_step: called after every step, outside the timed part, with the step and a function
                that waits for its latents and returns a copy.
            spans: list to which the times of all launches are appended; each launch is then waited
                for.
            limits: checked before every launch on the CPU. On a GPU they are checked before every
                step, and then the loop waits for each step.

        Returns:
            Final latents (N, C, H, W) float32, and the timing.

        Raises:
            CancelledError, DeadlineError: because of ``limits``; the session remains usable.
        """
        with self._stream.held():
            if limits is None:
                return self._run(request, on_step, spans, None)
            try:
                with (
                    limits.token.calling(self._stream.interrupt) if limits.token else nullcontext()
                ):
                    return self._run(request, on_step, spans, limits)
            except GocError:
                limits.check()  # An interrupted launch fails because of the token.
                raise

    def _run(
        self,
        request: Request,
        on_step: StepCallback | None,
        spans: list[Span] | None,
        limits: CallLimits | None,
    ) -> tuple[np.ndarray, Timing]:
        stream, started = self._stream, time.perf_counter()
        stream.resume(interruptible=limits is not None and limits.token is not None)
        with recorded(spans, "prepare", "prepare"):
            runnable = self._prepare(request)
        bound, prepare_ms = runnable.plan, 1e3 * (time.perf_counter() - started)
        for step, launches in enumerate(self._checked(runnable.steps, limits)):
            stream.mark(2 * step)
            if spans is None:
                for launch in launches:
                    launch()
            else:
                name = f"step {step} ({self._plan.step_kind(step)})"
                _run_profiled(bound.steps[step], name, stream, spans, limits)
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

    def _checked(
        self, steps: Sequence[Sequence[Run]], limits: CallLimits | None
    ) -> Sequence[Sequence[Run]]:
        """The calls of each step, with a check between them if there are limits."""
        if limits is None:
            return steps
        check = limits.check
        if self.on_cpu:
            return [[call for launch in launches for call in (check, launch)] for launches in steps]
        # The host would be many steps ahead of the device, and its checks would be too early.
        return [[self._stream.wait, check, *launches] for launches in steps]

    def prepare(self, request: Request) -> BoundPlan:
        """Bind the plan and upload a request, for a caller that runs the launches itself."""
        inputs = self._inputs(request)
        plan = self.bind(inputs.batch).plan
        self._upload(request, inputs, plan)
        return plan

    def _prepare(self, request: Request) -> _Runnable:
        """Bind the plan for the shape of a request, record it if it has run, and upload inputs."""
        inputs = self._inputs(request)
        runnable = self.bind(inputs.batch)
        if runnable.ran and not runnable.recorded:
            runnable.steps = self._recorded(runnable.plan)
            runnable.recorded = True
        self._upload(request, inputs, runnable.plan)
        return runnable

    def _inputs(self, request: Request) -> Inputs:
        # Binding and recording a shape costs more than padding.
        pads_labels = self._backend.device.shares_launches
        return prepared(request, self._spec, pads_labels=pads_labels)

    def _upload(self, request: Request, inputs: Inputs, plan: BoundPlan) -> None:
        """Upload the arrays of a request to the buffers that the launches read."""
        buffers, batch, upload = self.buffers, inputs.batch, self._stream.upload
        captions = request.conditions.captions
        if captions is None:
            upload(inputs.in_table, buffers.rows.labels.view(batch.labels))
        else:
            assert buffers.captions is not None
            embeds, bias = captions.embeds[inputs.distinct], captions.bias[inputs.distinct]
            upload(embeds, buffers.captions.embeds.view(*embeds.shape))
            upload(bias, buffers.captions.bias.view(*bias.shape))
            upload(inputs.index, buffers.captions.rows.view(batch.rows))
            if buffers.rows.pooled is not None:
                pooled = captions.pooled[inputs.in_table]
                upload(pooled, buffers.rows.pooled.view(*pooled.shape))
        if buffers.patches is not None:
            patches = patches_of(request.references, self._spec)
            upload(patches, buffers.patches.view(*patches.shape))
        upload(inputs.table_rows, buffers.rows.label_rows.view(batch.rows))
        upload(inputs.rows, buffers.rows.images.view(batch.rows))
        upload(inputs.cond_rows, buffers.rows.cond_rows.view(batch.images))
        upload(inputs.uncond_rows, buffers.rows.uncond_rows.view(batch.images))
        upload(inputs.guidance, buffers.guidance.view(*inputs.guidance.shape))
        if buffers.skips is not None:
            skipped = batch.rows - batch.images + inputs.cond_rows
            upload(skipped, buffers.skips.rows.view(batch.images))
            upload(inputs.skip_weights, buffers.skips.weights.view(*inputs.skip_weights.shape))
        upload(np.array([request.guidance], np.float32), buffers.embedded_guidance)
        self._upload_size(self._spec_of(batch))
        upload(np.float32(self._plan.sampler.start) * request.noise[:, 0], plan.initial)
        if buffers.shared is not None:
            upload(BEFORE_THE_FIRST_STEP, buffers.shared.step)
        for source, target in plan.resets:
            self._stream.copy(source, target)
        if self._plan.sampler.stochastic:
            for step, target in enumerate(plan.noise):
                upload(request.noise[:, step + 1], target)
        self._stream.wait()

    def _upload_size(self, spec: ModelSpec) -> None:
        """Upload what depends on the size of a sample, unless it is in the buffers already."""
        axes = (spec.axes, *spec.reference_axes)
        if axes == self._axes:
            return
        self._axes = ()  # until all of it is there
        for name, values in size_tensors(spec).items():
            self._stream.upload(values, self.buffers.of_size[name].view(*values.shape))
        plan, buffers = self._plan_of(spec), self.buffers
        if plan.sampler.size_shift is not None:
            self._stream.upload(constants_from_plan(plan), buffers.constants)
            timesteps = timesteps_from_plan(plan, buffers.modulation.chunk)
            self._stream.upload(timesteps, buffers.modulation.timesteps)
        if self._holds_table:
            self._upload_table(plan)
        self._axes = axes

    def _plan_of(self, spec: ModelSpec) -> Plan:
        """The plan with the timesteps of a size; they depend on its number of tokens."""
        if spec.tokens == self._spec.tokens:
            return self._plan
        return replace(self._plan, sampler=self._plan.sampler.at(spec.tokens))

    def _upload_table(self, plan: Plan) -> None:
        """Upload the modulation table of a plan, unless its timesteps are those of the last one."""
        key, spec, tables = table_key(plan), self._spec, self._engines.tables
        if key == self._table_key:
            return
        assert tables is not None
        self._table_key = ""  # until the whole table is there
        shape = (plan.steps, spec.modulation.count, 1, spec.hidden)
        tables.fill(plan, self.buffers.modulation.table.view(*shape), self._stream)
        self._table_key = key

    def forget_table(self) -> None:
        """Upload the modulation table again for the next request, after an exchange of weights."""
        self._axes, self._table_key = (), ""

    def _spec_of(self, batch: Batch) -> ModelSpec:
        """Sizes of the model for the samples of a batch."""
        return self._spec.at(batch.axes, batch.references) if batch.axes else self._spec

    def _recorded(self, plan: BoundPlan) -> tuple[Sequence[Run], ...]:
        """The calls of each step; steps with the same launches are recorded once."""
        recordings: dict[tuple[int, ...], Sequence[Run]] = {}
        calls = []
        for step in plan.steps:
            key = tuple(map(id, step.launches))
            if key not in recordings:
                recordings[key] = self._stream.recorded(_runs(step.launches))
            calls.append([*_runs(step.before), *recordings[key]])
        return tuple(calls)

    def unbind(self) -> tuple[Batch, ...]:
        """Unbind all engines before an exchange of weights.

        Returns:
            The shapes that were bound, for `bind_all`.
        """
        batches = tuple(self._bound)
        self._bound.clear()
        return batches

    def bind_all(self, batches: Sequence[Batch]) -> None:
        """Bind the plan for some shapes."""
        with self._stream.held():
            for batch in batches:
                self.bind(batch)

    def bind(self, batch: Batch) -> _Runnable:
        """Bind the plan for a batch shape; the last few shapes are kept."""
        if batch not in self._bound:
            plan = self._bound_plan(batch)
            steps = tuple([*_runs(step.before), *_runs(step.launches)] for step in plan.steps)
            self._bound[batch] = _Runnable(plan, steps)
            if len(self._bound) > MAX_BOUND_SHAPES:
                self._bound.popitem(last=False)
        self._bound.move_to_end(batch)
        return self._bound[batch]

    def _bound_plan(self, batch: Batch) -> BoundPlan:
        """The plan for a batch shape, whose rows for skip-layer guidance end with its last step."""
        binder, stop = self._binder(batch), batch.skip_steps.stop
        if not stop:
            return binder.bind(0, self._plan.steps)
        rest = self._binder(batch.without_skips, binder)
        return binder.bind(0, stop).followed_by(rest.bind(stop, self._plan.steps))

    def _binder(self, batch: Batch, earlier: Binder | None = None) -> Binder:
        spec = self._spec_of(batch)
        args = (self._engines, spec, self._plan, self.buffers, batch, self._stream, earlier)
        device = self._backend.device
        return SharedBinder(device, *args) if device.shares_launches else Binder(*args)
