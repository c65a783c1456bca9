"""Runs schedules on units with further outputs, and shows every run of such a unit."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from goc_deploy.engine_dir.manifest import Manifest
from goc_deploy.errors import VerificationError
from goc_deploy.host_memory import host_array
from goc_deploy.options import Progress
from goc_deploy.policies.calibration import CalibrationOptions, MoreOutputs, Observation
from goc_deploy.protocols import Backend, Buffer
from goc_deploy.runtime.calibration.calibrator import calibration_requests
from goc_deploy.runtime.calibration.stepper import Stepper
from goc_deploy.runtime.calibration.trajectory import Trajectory
from goc_deploy.runtime.model_engines import Engines
from goc_deploy.samplers import SamplerTable
from goc_deploy.schedule import Schedule


class ObservingStepper(Stepper):
    """A stepper that binds further outputs of units, and shows them after every run.

    Args:
        engines: the loaded engines.
        backend: the backend that loaded them, in host memory.
        manifest: manifest of the engine directory.
        table: table of the sampler.
        images: the largest number of images of a request.
        more: the further outputs.
        see: called after every run of a unit that has them.
    """

    def __init__(
        self,
        engines: Engines,
        backend: Backend,
        manifest: Manifest,
        table: SamplerTable,
        images: int,
        more: MoreOutputs,
        see: Callable[[Observation], None],
    ) -> None:
        capacity = min(images, manifest.max_batch)
        super().__init__(engines, backend, manifest.model, manifest.precision, table, capacity)
        self._units, self._see = engines.units, see
        self._more: Mapping[str, Mapping[str, Buffer]] = {
            unit: {name: backend.allocate(shape, "float32") for name, shape in outputs.items()}
            for unit, outputs in more.items()
        }

    def run_unit(self, unit: int) -> None:
        """Run the engine of a unit; see `Stepper.run_unit`."""
        name = self.spec.unit_names[unit]
        more = self._more.get(name)
        if more is None:
            super().run_unit(unit)
            return
        launch = self._step.updates[unit]
        self._units[name].bind(launch.inputs, {**launch.outputs, **more})()
        inputs, outputs, others = (
            {tensor: host_array(buffer) for tensor, buffer in buffers.items()}
            for buffers in (launch.inputs, launch.outputs, more)
        )
        self._see(Observation(name, self.step, inputs, outputs, others))


def observe(
    stepper: ObservingStepper, schedule: Schedule, options: CalibrationOptions, progress: Progress
) -> None:
    """Run the calibration images under a schedule.

    Raises:
        VerificationError: the results are not finite.
    """
    kinds = schedule.history, schedule.history_depth, schedule.level
    done, what = 0, f"observing {schedule.policy}"
    for request in calibration_requests(stepper, options, stepper.capacity):
        trajectory, images = Trajectory(stepper, request, *kinds), len(request.noise)
        for step, rows in enumerate(schedule.coefficients):
            progress(what, done * schedule.steps + step * images, options.images * schedule.steps)
            trajectory.advance(step, rows)
        if not np.isfinite(trajectory.latents).all():
            raise VerificationError(
                f"calibration with {schedule.policy} results in NaN or infinite latents; check the "
                "plan and the weights"
            )
        done += images
