"""One sampling step of a session, launch by launch, with its tensors in sight.

Calibration looks at features and decides by them, which a compiled plan never does. It therefore
runs a session whose plan computes every unit and stores every feature, and calls the bound launches
itself. In place of a launch it may add what it predicted. It reads and writes the tensors that the
launches were bound to, as NumPy arrays on host memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from goc_deploy.compiler import Compute, Plan
from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.host_memory import host_array
from goc_deploy.protocols import Backend
from goc_deploy.runtime.binding import Engines
from goc_deploy.runtime.bound import BoundLaunch, BoundPlan, BoundStep
from goc_deploy.runtime.loading import load_engines
from goc_deploy.runtime.request import Request
from goc_deploy.runtime.session import Session
from goc_deploy.samplers import SamplerTable
from goc_deploy.schedule import COMPUTE, Schedule
from goc_deploy.spec import ModelSpec


class Stepper:
    """Runs one sampling step of a request.

    A step is `begin`, then `compute` or `add` for every unit in order, then `finish`. Nothing of a
    trajectory is kept here: latents, estimates and features belong to the caller, so any number of
    trajectories may advance in turn. Arithmetic of NumPy is float32 whatever the precision of the
    engines.

    Args:
        engines: loaded units; predict graphs are not needed.
        backend: that loaded them, on host memory.
        spec: the model.
        precision: of the engines.
        table: the sampler.
        capacity: the largest number of images of a request.
    """

    def __init__(
        self,
        engines: Engines,
        backend: Backend,
        spec: ModelSpec,
        precision: str,
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
        schedule = Schedule(spec.depth, spec.branches, ((COMPUTE,) * spec.units,) * table.steps)
        every_unit = tuple(Compute(unit, store=0) for unit in range(spec.units))
        plan = Plan("calibration", table, (every_unit,) * table.steps, 1, schedule)
        # Trajectories may be at any step, so each step makes its own row of the modulation table.
        self._session = Session(engines, backend, spec, precision, plan, capacity, chunk=1)
        self._update = np.empty(0, np.float32)
        self._request: Request | None = None
        self._plan: BoundPlan
        self._step: BoundStep

    def begin(
        self, step: int, request: Request, latents: np.ndarray, estimates: Sequence[np.ndarray] = ()
    ) -> None:
        """Start a step: its modulation, and tokens from the latents.

        Args:
            step: which step.
            request: the images; its noise is what a stochastic sampler adds.
            latents: (N, C, H, W) before the step.
            estimates: what a multistep sampler kept of earlier steps, newest first; (N, C, H, W)
                each.
        """
        if request is not self._request:
            self._plan, self._request = self._session.prepare(request), request
            if step:  # captions get their keys and values in the first step
                _run(self._plan.steps[0].before)
        self._step = self._plan.steps[step]
        inputs = self._step.end[-1].inputs
        host_array(inputs["latents"])[...] = latents
        for place, lag in enumerate(self.table.reads(step), 1):
            if lag <= len(estimates):  # else the sampler is bound to zeros
                host_array(inputs[f"estimate_{place}"])[...] = estimates[lag - 1]
        _run((*self._step.before, *self._step.start))

    @property
    def feature_shape(self) -> tuple[int, ...]:
        """(B, T, D) of the current step: rows (conditional, then unconditional), tokens, width."""
        return self._step.start[-1].outputs["x"].shape

    def compute(self, unit: int) -> np.ndarray:
        """Run a unit's engine, which adds its gated feature to the tokens.

        Returns:
            The feature (B, T, D) in the engine's dtype: a view that the next call overwrites.
        """
        launch = self._step.updates[unit]
        launch.run()
        return host_array(launch.outputs["feature"]).reshape(self.feature_shape)

    def add(self, unit: int, feature: np.ndarray) -> None:
        """Add ``gate * feature`` to the tokens in place of the unit's engine.

        Args:
            unit: which unit.
            feature: (B, T, D) float32.
        """
        launch = self._step.updates[unit]
        gate = host_array(self._step.start[0].outputs["modulation"])[unit, :, None]
        if self._update.shape != feature.shape:
            self._update = np.empty(feature.shape, np.float32)
        np.multiply(gate, feature, out=self._update)
        tokens, target = host_array(launch.inputs["x"]), host_array(launch.outputs["x_out"])
        np.add(tokens, self._update, out=target, casting="same_kind")

    def finish(self) -> tuple[np.ndarray, np.ndarray | None]:
        """End the step: final layer, guidance and the sampler's row.

        Returns:
            The latents after the step, (N, C, H, W) float32, and what a multistep sampler keeps of
            it; copies.
        """
        _run(self._step.end)
        outputs = self._step.end[-1].outputs
        estimate = host_array(outputs["estimate"]).copy() if self.table.lags else None
        return host_array(outputs["latents_out"]).copy(), estimate


def _run(launches: Sequence[BoundLaunch]) -> None:
    for launch in launches:
        launch.run()


def load_stepper(
    directory: EngineDir, backend: Backend, table: SamplerTable, images: int
) -> Stepper:
    """Load an engine directory to drive its units one at a time with a sampler.

    Args:
        directory: the engine directory.
        backend: loads the graphs, on host memory.
        table: the sampler.
        images: the largest number of images of a request, at most the engine's ``max_batch``.

    Raises:
        EngineDirError, SafetyError: the directory is corrupt or not ours.
        EnvironmentUnsupportedError: the backend has no kernels for its precision.
    """
    manifest = directory.manifest
    engines = load_engines(directory, (), backend, (table.graph,))
    capacity = min(images, manifest.max_batch)
    return Stepper(engines, backend, manifest.model, manifest.precision, table, capacity)
