"""Running schedules that are in no engine directory yet, to measure what they cost and how far off they end."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from goc_deploy.calibration import CalibrationOptions, balanced_labels
from goc_deploy.passes import compile_schedule
from goc_deploy.protocols import Backend, Engine
from goc_deploy.publish import read_manifest
from goc_deploy.schedule import Schedule


@dataclass(frozen=True, slots=True)
class Trial:
    """What came of a run that was not warmed up.

    Attributes:
        latents: final latents (N, C, H, W) float32.
        total_ms: of the run.
        step_ms: median over the steps of each kind: ``full``, ``mixed``, ``collapsed``.
    """

    latents: np.ndarray
    total_ms: float
    step_ms: dict[str, float]


class Trials:
    """Compiles and runs schedules on the loaded units of an engine directory, as its plans would run.

    Args:
        directory: the engine directory.
        backend: loads the graphs.
    """

    def __init__(self, directory: Path, backend: Backend) -> None:
        from goc_deploy.runtime.loading import load_engines

        self._backend = backend
        self.manifest = read_manifest(directory)
        self._units = load_engines(directory, self.manifest, [], backend).units
        self._predict: dict[str, Engine] = {}

    def run(self, schedule: Schedule, sampler: str, images: CalibrationOptions) -> Trial:
        """Draw calibration images with a schedule.

        Raises:
            VerificationError: the results are not finite.
            ScheduleError: the schedule is illegal.
        """
        from goc_deploy.exporters.cache_update import predict_graph
        from goc_deploy.runtime.binding import Engines
        from goc_deploy.runtime.pipeline import Pipeline

        manifest = self.manifest
        plan = compile_schedule(schedule, manifest.model, sampler, name="trial")
        for signature in plan.signatures:
            if signature not in self._predict:
                graph = predict_graph(signature, manifest.model, manifest.precision)
                self._predict[signature] = self._backend.load(memoryview(graph.SerializeToString()), {})
        labels = balanced_labels(manifest.model.classes, images.images, images.seed)
        size = min(len(labels), manifest.max_batch)
        with Pipeline(manifest, plan, Engines(self._units, self._predict), self._backend, size, 1) as pipe:
            result = pipe.generate(
                labels, seed=images.seed, cfg_scale=images.cfg_scale, cfg_channels=images.cfg_channels
            )
        steps = [(step["kind"], step["ms"]) for batch in result.report["batches"] for step in batch["steps"]]
        kinds = {kind: median(ms for k, ms in steps if k == kind) for kind in sorted({k for k, _ in steps})}
        return Trial(result.latents, result.report["total_ms"], kinds)


def relative_l2(found: np.ndarray, expected: np.ndarray) -> float:
    """``|found - expected| / |expected|`` over everything, in float64."""
    difference = np.linalg.norm((found.astype(np.float64) - expected).ravel())
    return float(difference / max(float(np.linalg.norm(expected.astype(np.float64).ravel())), 1e-30))
