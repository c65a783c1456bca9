"""An engine directory to pipelines: verify, load, share."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from goc_deploy.engine_dir import load_plan
from goc_deploy.errors import EngineDirError, GocError, ResourceError, UsageError
from goc_deploy.manifest import Manifest, Unit
from goc_deploy.plan import Plan
from goc_deploy.protocols import DTYPE_OF_PRECISION, Backend, Engine, mapped_buffer
from goc_deploy.publish import read_manifest, read_verified
from goc_deploy.runtime import memory
from goc_deploy.runtime.binding import Engines
from goc_deploy.runtime.buffers import planned_bytes
from goc_deploy.runtime.pipeline import Pipeline


def load_pipelines(
    directory: Path, backend: Backend, names: Sequence[str | None], batch_size: int | None, max_sessions: int
) -> list[Pipeline]:
    """Load an engine directory once, for one or more of its plans.

    Args:
        directory: the engine directory.
        backend: loads the graphs and owns the buffers.
        names: plans by name or SPEC; None is the first plan that caches.
        batch_size: images per run; None is the engine's ``max_batch``.
        max_sessions: sessions of each pipeline.

    Raises:
        EngineDirError, SafetyError: the directory is corrupt or not ours.
        UsageError: no such plan, or a number out of range.
        ResourceError: the buffers do not fit into memory.
    """
    if max_sessions < 1:
        raise UsageError(f"max_sessions must be at least 1, got {max_sessions}")
    manifest = read_manifest(directory)
    plans = [load_plan(directory, manifest, name) for name in names]
    images = manifest.max_batch if batch_size is None else batch_size
    if not 1 <= images <= manifest.max_batch:
        raise UsageError(
            f"batch size {images} must be within 1..{manifest.max_batch}, what the engine was exported for (--max-batch)"
        )
    for plan in plans:
        _check_memory(manifest, plan, images, max_sessions)
    engines = _load_engines(directory, manifest, plans, backend)
    return [Pipeline(manifest, plan, engines, backend, images, max_sessions) for plan in plans]


def _load_engines(directory: Path, manifest: Manifest, plans: Sequence[Plan], backend: Backend) -> Engines:
    """Verify every file that the plans need, in parallel, then load the graphs."""
    signatures = sorted({signature for plan in plans for signature in plan.signatures})
    missing = [signature for signature in signatures if signature not in manifest.predict]
    if missing:
        raise EngineDirError(
            f"{directory} lists no predict graph for {missing[0]!r}, which a plan needs; add the plan again"
        )
    needed = {"conditioning", "embed", "final", "modulation", "sampler"}
    needed |= {f"block_{b:02d}_{branch}" for b in range(manifest.model.depth) for branch in manifest.model.branches}
    lacking = sorted(needed - {unit.name for unit in manifest.units})
    if lacking:
        raise EngineDirError(f"{directory} lists no unit {lacking[0]!r}, which the model needs; export again")
    entries = {file.path: file for file in manifest.files}
    predict = {signature: manifest.predict[signature] for signature in signatures}
    paths = sorted({p for unit in manifest.units for p in (unit.onnx, unit.weights) if p} | set(predict.values()))
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        content = dict(zip(paths, pool.map(lambda path: read_verified(directory, entries[path]), paths), strict=True))

    dtype = DTYPE_OF_PRECISION[manifest.precision]

    def loaded(path: str, unit: Unit | None = None) -> Engine:
        weights = content[unit.weights] if unit and unit.weights else memoryview(b"")
        parameters = {
            p.name: mapped_buffer(weights, p.offset, p.shape, dtype) for p in (unit.parameters if unit else ())
        }
        try:
            return backend.load(content[path], parameters, runs_once=unit is not None and unit.name == "conditioning")
        except GocError as cause:
            raise type(cause)(f"{directory / path}: {cause}") from cause

    units = {unit.name: loaded(unit.onnx, unit) for unit in manifest.units}
    engines = Engines(units, {signature: loaded(path) for signature, path in predict.items()})
    memory.return_free_pages(content.values())
    return engines


def _check_memory(manifest: Manifest, plan: Plan, images: int, sessions: int) -> None:
    needed = sessions * planned_bytes(manifest.model, manifest.precision, plan, images)
    available = memory.available_bytes()
    if available is not None and needed > available:
        raise ResourceError(
            f"plan {plan.name} needs {needed / 1e9:.2f} GB of buffers for {sessions} sessions of {images} images "
            f"but {available / 1e9:.2f} GB are available; use a smaller batch size"
        )
