"""One sampling step of a session, launch by launch, with access to its tensors.

Calibration reads features and makes decisions that depend on them, unlike a compiled plan. It
therefore runs a session whose plan computes every unit and stores every feature, and calls the
bound launches itself. It may replace a launch by a prediction. It reads and writes the tensors of
the launches as NumPy arrays in host memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from goc_deploy.blocks import ALL_STREAMS, TokenStream, Unit
from goc_deploy.compiler import Compute, Plan
from goc_deploy.compiler.values import features_of_units
from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.errors import UsageError
from goc_deploy.host_memory import host_array
from goc_deploy.precision import Precision
from goc_deploy.protocols import Backend
from goc_deploy.runtime.block_binding import TOKENS
from goc_deploy.runtime.bound import BoundLaunch, BoundPlan, BoundStep
from goc_deploy.runtime.loading import load_engines
from goc_deploy.runtime.model_engines import Engines
from goc_deploy.runtime.request import Request
from goc_deploy.runtime.session import Session
from goc_deploy.samplers import SamplerTable
from goc_deploy.schedule import COMPUTE, Schedule
from goc_deploy.spec import ModelSpec


class Stepper:
    """Runs one sampling step of a request.

    A step is `begin`, then `compute` or `add` for every unit in order, or `skip` in place of all
    units, then `finish`. A stepper has no state of a trajectory: latents, estimates and features
    belong to the caller, so any number of trajectories may advance in turn. NumPy computes in
    float32 for every precision of the engines.

    Args:
        engines: the loaded engines; predict graphs are not needed.
        backend: the backend that loaded them, in host memory.
        spec: sizes of the model.
        precision: precision of the engines.
        table: table of the sampler.
        capacity: the largest number of images of a request.
    """

    def __init__(
        self,
        engines: Engines,
        backend: Backend,
        spec: ModelSpec,
        precision: Precision,
        table: SamplerTable,
        capacity: int,
    ) -> None:
        assert backend.device.kind == "cpu", "NumPy must see the tensors"
        self.spec, self.table, self.capacity, self.captions = (
            spec,
            table,
            capacity,
            engines.captions,
        )
        units = spec.declared_units
        schedule = Schedule.of(spec, ((COMPUTE,) * spec.units,) * table.steps)
        every_unit = tuple(_keeping_features(unit, kind) for unit, kind in enumerate(units))
        slots = [
            max(sum(feature.stream == stream for feature in kind.features) for kind in units)
            for stream in ALL_STREAMS
        ]
        plan = Plan(
            "calibration",
            table,
            (every_unit,) * table.steps,
            slots[0],
            schedule,
            text_slots=slots[1],
            reference_slots=slots[2],
        )
        # Trajectories may be at any step, so each step makes its own row of the modulation table.
        self._session = Session(engines, backend, spec, precision, plan, capacity, chunk=1)
        self._update = np.empty(0, np.float32)
        self._request: Request | None = None
        self._plan: BoundPlan
        self._step: BoundStep
        self.step = 0  # the current one

    def begin(
        self, step: int, request: Request, latents: np.ndarray, estimates: Sequence[np.ndarray] = ()
    ) -> None:
        """Start a step: run its modulation, and compute tokens from the latents.

        Args:
            step: index of the step.
            request: the images, with the noise of a stochastic sampler.
            latents: (N, C, H, W) before the step.
            estimates: estimates of earlier steps for a multistep sampler, newest first, (N, C, H,
                W) each.
        """
        if request is not self._request:
            self._plan, self._request = self._session.prepare(request), request
            if step:  # the launches before the first step compute keys and values of captions
                _run(self._plan.steps[0].before)
        self._step, self.step = self._plan.steps[step], step
        inputs = self._step.end[-1].inputs
        host_array(inputs["latents"])[...] = latents
        for place, lag in enumerate(self.table.reads(step), 1):
            if lag <= len(estimates):  # otherwise the sampler is bound to zeros
                host_array(inputs[f"estimate_{place}"])[...] = estimates[lag - 1]
        _run((*self._step.before, *self._step.start))

    @property
    def feature_shape(self) -> tuple[int, ...]:
        """Shape (B, T, D) of the current step: first the conditional, then unconditional rows."""
        return self._step.updates[0].inputs["x"].shape

    def compute(self, unit: int) -> list[np.ndarray]:
        """Run the engine of a unit, which adds its gated features to the tokens.

        Returns:
            The features (B, T, D), or (B, Lc, D) of the text, in the dtype of the engine, which are
            views that the next call overwrites.
        """
        self.run_unit(unit)
        launch = self._step.updates[unit]
        rows, _, hidden = self.feature_shape
        return [
            host_array(launch.outputs[feature.output]).reshape(rows, -1, hidden)
            for feature in self.spec.declared_units[unit].features
        ]

    def run_unit(self, unit: int) -> None:
        """Run the launch of a unit."""
        self._step.updates[unit].run()

    def add(self, unit: int, features: Iterable[np.ndarray]) -> None:
        """Add ``gate * feature`` to the tokens in place of the engine of a unit.

        Args:
            unit: index of the unit.
            features: its features, (B, T, D) or (B, Lc, D) float32. Each is used before the next is
                asked for.
        """
        launch = self._step.updates[unit]
        gates = host_array(self._step.start[0].outputs["modulation"])
        added: set[TokenStream] = set()
        of_unit = features_of_units(self.spec)[unit]
        for (index, stream), feature in zip(of_unit, features, strict=True):
            if self._update.shape != feature.shape:
                self._update = np.empty(feature.shape, np.float32)
            np.multiply(gates[index, :, None], feature, out=self._update)
            target = host_array(launch.outputs[f"{TOKENS[stream]}_out"])
            tokens = target if stream in added else host_array(launch.inputs[TOKENS[stream]])
            np.add(tokens, self._update, out=target, casting="same_kind")
            added.add(stream)

    @property
    def start_tokens(self) -> np.ndarray:
        """The tokens (B, T, D) before the first unit, a view that is valid until units run."""
        return host_array(self._step.updates[0].inputs["x"])

    @property
    def end_tokens(self) -> np.ndarray:
        """The tokens (B, T, D) after the last unit, a view that is valid once it ran."""
        return host_array(self._step.updates[-1].outputs["x_out"])

    def skip(self, residual: np.ndarray) -> None:
        """Add a residual (B, T, D) to the tokens in place of all units."""
        np.add(self.start_tokens, residual, out=self.end_tokens, casting="same_kind")

    def finish(self) -> tuple[np.ndarray, np.ndarray | None]:
        """End the step: run the final layer, the guidance and the sampler.

        Returns:
            Copies of the latents after the step, (N, C, H, W) float32, and of the estimate of a
            multistep sampler, or None.
        """
        _run(self._step.end)
        outputs = self._step.end[-1].outputs
        estimate = host_array(outputs["estimate"]).copy() if self.table.lags else None
        return host_array(outputs["latents_out"]).copy(), estimate

    def model_output(self) -> tuple[np.ndarray, np.ndarray]:
        """The model output of the step that `finish` ended, without variance channels.

        Returns:
            Copies of the conditional and of the unconditional output, (N, C, H, W) float32.
        """
        prediction = host_array(self._step.end[-1].inputs["prediction"])
        return self._halves(prediction[:, : self.spec.channels])

    def final_tokens(self) -> tuple[np.ndarray, np.ndarray]:
        """The tokens that the final layer read, (N, T, D) float32, as `model_output`."""
        return self._halves(self.end_tokens)

    def _halves(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The conditional and the unconditional row of each image."""
        inputs = self._step.end[-1].inputs
        cond, uncond = (host_array(inputs[name]) for name in ("cond_rows", "uncond_rows"))
        return rows[cond].astype(np.float32), rows[uncond].astype(np.float32)


def _keeping_features(unit: int, kind: Unit) -> Compute:
    """The launch of a unit that keeps each of its features in a slot of its own."""
    used: Counter[TokenStream] = Counter()
    stores = []
    for feature in kind.features:
        stores.append(used[feature.stream])
        used[feature.stream] += 1
    return Compute(unit, tuple(stores))


def _run(launches: Sequence[BoundLaunch]) -> None:
    for launch in launches:
        launch.run()


def load_stepper(
    directory: EngineDir, backend: Backend, table: SamplerTable, images: int
) -> Stepper:
    """Load an engine directory to drive its units one at a time with a sampler.

    Args:
        directory: the engine directory.
        backend: loads the graphs into host memory.
        table: table of the sampler.
        images: the largest number of images of a request, limited by the ``max_batch`` of the
            engine directory.

    Raises:
        UsageError: the model has two sets of weights.
        EngineDirError, SafetyError: the engine directory is corrupt or not from this package.
        EnvironmentUnsupportedError: the backend has no kernels for its precision.
    """
    return stepper_maker(directory, backend, (table.graph,), images)(table)


def stepper_maker(
    directory: EngineDir, backend: Backend, graphs: Sequence[str], images: int
) -> Callable[[SamplerTable], Stepper]:
    """Load an engine directory once to drive it with several samplers.

    Args:
        directory: the engine directory.
        backend: loads the graphs into host memory.
        graphs: names of the sampler graphs.
        images: the largest number of images of a request, as for `load_stepper`.

    Returns:
        What makes a stepper of a table whose graph is one of ``graphs``.

    Raises:
        UsageError, EngineDirError, SafetyError, EnvironmentUnsupportedError: as for `load_stepper`.
    """
    manifest = directory.manifest
    if manifest.model.boundary:
        raise UsageError(
            "policies that calibrate are not supported for a model with two sets of weights; use "
            "one that learns nothing from images, such as fora:2+gc:0.5"
        )
    engines = load_engines(directory, (), backend, graphs)
    capacity = min(images, manifest.max_batch)
    return lambda table: Stepper(
        engines, backend, manifest.model, manifest.precision, table, capacity
    )
