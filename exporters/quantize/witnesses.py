"""What units computed for one batch before they were quantised, to judge what they do after."""

from __future__ import annotations

import mmap
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from goc_deploy.engine_dir.manifest import GraphEntry
from goc_deploy.engine_dir.weights import mapped_weights
from goc_deploy.errors import VerificationError
from goc_deploy.metrics.paired import whole_relative_l2
from goc_deploy.policies.calibration import Observation
from goc_deploy.protocols import Backend

# What quantised activations may change in an output of a unit, on inputs of plans. The trained
# model in examples/mnist has up to 0.04 with factors.
TOLERANCE = 0.5


@dataclass(frozen=True, slots=True)
class Witnesses:
    """Keeps one run of every unit in a file.

    Attributes:
        folder: folder of the files.
    """

    folder: Path
    _kept: set[str] = field(default_factory=set)

    def keep(self, run: Observation) -> None:
        """Keep a run, unless one of that unit was kept before."""
        if run.unit not in self._kept:
            self._kept.add(run.unit)
            arrays = {f"in.{name}": values for name, values in run.inputs.items()}
            arrays |= {f"out.{name}": values for name, values in run.outputs.items()}
            np.savez(self.folder / f"{run.unit}.npz", **arrays)  # type: ignore[arg-type]

    def error(self, unit: GraphEntry, folder: Path, backend: Backend) -> float:
        """Run a quantised unit on the inputs that were kept.

        Args:
            unit: the unit.
            folder: folder of its files, ``NAME.onnx`` and ``NAME.weights``.
            backend: runs it.

        Returns:
            The largest relative L2 error over the outputs.

        Raises:
            VerificationError: it is above ``TOLERANCE``.
        """
        with open(folder / f"{unit.name}.weights", "rb") as file:
            weights = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        graph = memoryview((folder / f"{unit.name}.onnx").read_bytes())
        engine = backend.load(graph, *mapped_weights(unit, weights))
        inputs, outputs, expected = {}, {}, {}
        with np.load(self.folder / f"{unit.name}.npz") as kept:
            for entry in kept.files:
                way, _, name = entry.partition(".")
                values = kept[entry]
                buffer = backend.allocate(values.shape, engine.dtypes[name])
                if way == "in":
                    backend.upload(values, buffer)
                    inputs[name] = buffer
                else:
                    outputs[name], expected[name] = buffer, values
        engine.bind(inputs, outputs)()
        error = max(
            whole_relative_l2(backend.download(buffer), expected[name])
            for name, buffer in outputs.items()
        )
        if not error <= TOLERANCE:
            raise VerificationError(
                f"unit {unit.name}: {unit.weight_format} changes its outputs by {error:.2e} "
                f"relative L2, allowed are {TOLERANCE:.0e}; add `quantize_exclude={unit.name}`"
            )
        return error
