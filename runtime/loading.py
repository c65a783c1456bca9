"""An engine directory to pipelines: verify, load, share."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from numbers import Integral
from pathlib import Path
from types import MappingProxyType

from goc_deploy.compiler import Compute, Plan, with_stacks
from goc_deploy.conditions.captions import captions_from_bytes
from goc_deploy.conditions.text import TextEncoder
from goc_deploy.engine_dir.graph_check import check_graph, external_tensors
from goc_deploy.engine_dir.manifest import Manifest, Unit
from goc_deploy.engine_dir.plans import load_plan
from goc_deploy.engine_dir.reading import read_manifest, read_verified
from goc_deploy.engine_dir.weights import mapped_parts
from goc_deploy.errors import (
    EngineDirError,
    EnvironmentUnsupportedError,
    GocError,
    ResourceError,
    UsageError,
)
from goc_deploy.options import Progress
from goc_deploy.policies.calibration import CalibrationOptions
from goc_deploy.protocols import DTYPE_OF_PRECISION, Backend, Engine, Footprint
from goc_deploy.runtime import memory
from goc_deploy.runtime.binding import Engines
from goc_deploy.runtime.buffers import planned_bytes
from goc_deploy.runtime.calibrator import EngineCalibrator
from goc_deploy.runtime.decoder import LatentDecoder
from goc_deploy.runtime.pipeline import Attached, Pipeline
from goc_deploy.runtime.stepper import Stepper
from goc_deploy.runtime.weights import Weights
from goc_deploy.samplers import SamplerTable

logger = logging.getLogger(__name__)

MAX_SESSIONS = 1024


@dataclass(frozen=True, slots=True)
class UnlistedPlans:
    """Plans that an engine directory does not hold.

    Attributes:
        plans: by the name or SPEC that asks for one.
        predict_graph: makes the ONNX file of a predict signature.
    """

    plans: Mapping[str, Plan]
    predict_graph: Callable[[str], bytes]


def load_pipelines(
    directory: Path,
    backend: Backend,
    names: Sequence[str | None],
    batch_size: int | None,
    max_sessions: int,
    *,
    all_units: bool = False,
    unlisted: UnlistedPlans | None = None,
) -> list[Pipeline]:
    """Load an engine directory once, for one or more of its plans.

    Args:
        directory: the engine directory.
        backend: loads the graphs and owns the buffers.
        names: plans by name or SPEC; None is the first plan that caches.
        batch_size: images per run; None is the engine's ``max_batch``.
        max_sessions: sessions of each pipeline.
        all_units: load the units that none of these plans launches too, for `Pipeline.with_plan`.
        unlisted: plans that are not in the directory.

    Raises:
        EngineDirError, SafetyError: the directory is corrupt or not ours.
        UsageError: no such plan, or a number out of range.
        ResourceError: the buffers do not fit into memory.
    """
    for option, value in (("max_sessions", max_sessions), ("batch_size", batch_size)):
        if value is not None and (not isinstance(value, Integral) or isinstance(value, bool)):
            raise UsageError(f"{option} must be a whole number, got {value!r:.60}")
    if max_sessions is None or not 1 <= max_sessions <= MAX_SESSIONS:
        raise UsageError(
            f"max_sessions must be at least 1 and at most {MAX_SESSIONS}, got {max_sessions}"
        )
    manifest = read_manifest(directory)
    others = unlisted.plans if unlisted else {}
    plans = [
        others[name]
        if name is not None and name in others
        else load_plan(directory, manifest, name)
        for name in names
    ]
    images = manifest.max_batch if batch_size is None else batch_size
    if not 1 <= images <= manifest.max_batch:
        raise UsageError(
            f"batch size {images} must be within 1..{manifest.max_batch}, what the engine was exported for (`max_batch`)"
        )
    if backend.stacks:
        plans = [with_stacks(plan, manifest.model) for plan in plans]
    parts = {"decoder": manifest.decoder, "text_encoder": manifest.text}
    more = [name for name, part in parts.items() if part]
    more += manifest.model.unit_names if all_units else ()
    made = _made_predictors(manifest, plans, unlisted.predict_graph, backend) if unlisted else {}
    footprint = backend.footprint(
        _weights_of(manifest, needed_graphs(directory, manifest, plans, backend, more, made))
    )
    for plan in plans:
        _check_memory(manifest, plan, images, max_sessions, footprint, backend.device.free_bytes())
    engines = load_engines(directory, manifest, plans, backend, more, made)
    attached = Attached(
        _decoder(manifest, engines, backend), _text_encoder(directory, manifest, engines, backend)
    )
    return [
        Pipeline(manifest, plan, engines, backend, images, max_sessions, attached) for plan in plans
    ]


def _made_predictors(
    manifest: Manifest,
    plans: Sequence[Plan],
    predict_graph: Callable[[str], bytes],
    backend: Backend,
) -> dict[str, Engine]:
    """Engines of the predict signatures of plans for which the directory has no graph.

    Raises:
        EnvironmentUnsupportedError: the backend runs built engines only.
    """
    dtype = DTYPE_OF_PRECISION[manifest.precision]
    signatures = {signature for plan in plans for signature in plan.signatures}
    missing = [
        s
        for s in sorted(signatures - manifest.predict.keys())
        if backend.predictor(s, dtype) is None
    ]
    if missing and backend.stacks:
        raise EnvironmentUnsupportedError(
            "it runs engines that were built for a plan of the directory, and this plan is not there; add it with goc plan"
        )
    return {s: backend.load(memoryview(predict_graph(s)), {}) for s in missing}


def _text_encoder(
    directory: Path, manifest: Manifest, engines: Engines, backend: Backend
) -> TextEncoder | None:
    """The text encoder, where there is one and the package that it needs is installed; asked for a prompt without it,
    the pipeline says so."""
    if manifest.text is None or find_spec("tokenizers") is None:
        return None
    entry = next(file for file in manifest.files if file.path == manifest.text.tokenizer)
    tokenizer = bytes(read_verified(directory, entry))
    most = 2 * manifest.max_batch  # that TensorRT engines are built for
    return TextEncoder(
        engines.units["text_encoder"], backend, tokenizer, manifest.model, manifest.text, most
    )


def _decoder(manifest: Manifest, engines: Engines, backend: Backend) -> LatentDecoder | None:
    if manifest.decoder is None:
        return None
    return LatentDecoder(engines.units["decoder"], backend, manifest.decoder, manifest.model)


def load_stepper(directory: Path, backend: Backend, table: SamplerTable, images: int) -> Stepper:
    """Load an engine directory to drive its units one at a time with a sampler, ``images`` at most together.

    Raises:
        EngineDirError, SafetyError: the directory is corrupt or not ours.
        EnvironmentUnsupportedError: the backend has no kernels for its precision.
    """
    manifest = read_manifest(directory)
    engines = load_engines(directory, manifest, (), backend, (table.graph,))
    return Stepper(
        engines, manifest.model, manifest.precision, table, min(images, manifest.max_batch)
    )


def load_calibrator(
    directory: Path,
    backend: Backend,
    table: SamplerTable,
    options: CalibrationOptions,
    progress: Progress,
) -> EngineCalibrator:
    """Load an engine directory to calibrate on it.

    Raises:
        UsageError: an option out of range.
        EngineDirError, SafetyError, EnvironmentUnsupportedError: as `load_stepper`.
    """
    found = read_manifest(directory).provenance
    provenance = (
        {"checkpoint_sha256": found["checkpoint_sha256"]} if "checkpoint_sha256" in found else {}
    )
    return EngineCalibrator(
        load_stepper(directory, backend, table, options.images), options, provenance, progress
    )


@dataclass(frozen=True, slots=True)
class NeededGraphs:
    """Graphs to load: units by name, predict graphs and segments by signature.

    Attributes:
        predictors: engines of the predict signatures that need no graph.
    """

    units: Mapping[str, Unit]
    predict: Mapping[str, Unit]
    segments: Mapping[str, Unit]
    predictors: Mapping[str, Engine]

    @property
    def all(self) -> tuple[Unit, ...]:
        """Every one."""
        return (*self.units.values(), *self.predict.values(), *self.segments.values())


def needed_graphs(
    directory: Path,
    manifest: Manifest,
    plans: Sequence[Plan],
    backend: Backend,
    more: Iterable[str] = (),
    made: Mapping[str, Engine] = MappingProxyType({}),
) -> NeededGraphs:
    """The graphs that plans launch on a backend, and further units.

    Without plans all units of the blocks are needed, with plans those that one of them launches. ``made`` are engines of
    predict signatures that are loaded already.

    Raises:
        EngineDirError: the manifest does not list one.
    """
    signatures = {signature for plan in plans for signature in plan.signatures}
    dtype = DTYPE_OF_PRECISION[manifest.precision]
    offered = {s: made[s] if s in made else backend.predictor(s, dtype) for s in sorted(signatures)}
    predictors = {signature: engine for signature, engine in offered.items() if engine is not None}
    predict = {
        signature: manifest.predict_unit(signature)
        for signature in _listed(directory, manifest.predict, signatures - predictors.keys())
    }
    segments = {
        signature: manifest.segment_unit(signature)
        for signature in _listed(
            directory, manifest.segments, [s for plan in plans for s in plan.segment_signatures]
        )
    }
    needed = {
        "conditioning",
        "embed",
        "final",
        "modulation",
        "collect",
        *more,
        *_launched_units(manifest, plans),
    }
    needed |= {"captions"} if manifest.model.draws_captions else set()
    needed |= {plan.sampler.graph for plan in plans}
    lacking = sorted({*needed, *manifest.model.unit_names} - {unit.name for unit in manifest.units})
    if lacking:
        raise EngineDirError(
            f"{directory} lists no unit {lacking[0]!r}, which the model needs; export again"
        )
    units = {unit.name: unit for unit in manifest.units if unit.name in needed}
    return NeededGraphs(units, predict, segments, predictors)


def _weights_of(manifest: Manifest, graphs: NeededGraphs) -> dict[str, dict[str, int]]:
    """What `Backend.footprint` takes."""
    files = {file.path: file for file in manifest.files}
    weights = {
        unit.onnx: [part.weights for part in manifest.parts(unit).values() if part.weights]
        for unit in graphs.all
    }
    return {
        files[onnx].sha256: {path: files[path].size for path in paths}
        for onnx, paths in weights.items()
    }


def load_engines(
    directory: Path,
    manifest: Manifest,
    plans: Sequence[Plan],
    backend: Backend,
    more: Iterable[str] = (),
    made: Mapping[str, Engine] = MappingProxyType({}),
) -> Engines:
    """Verify every file of the graphs that are needed (`needed_graphs`), then check and load them; both in parallel.

    Raises:
        EngineDirError, SafetyError: a file is missing, corrupt or not ours, or a graph asks for more than its weights.
    """
    graphs = needed_graphs(directory, manifest, plans, backend, more, made)
    entries = {file.path: file for file in manifest.files}
    weights = {
        part.weights
        for unit in graphs.all
        for part in manifest.parts(unit).values()
        if part.weights
    }
    captions = {manifest.captions} if manifest.captions else set()
    paths = sorted({unit.onnx for unit in graphs.all} | weights | captions)

    def verified(path: str) -> memoryview:
        return read_verified(directory, entries[path])

    def loaded(unit: Unit) -> Engine:
        parts = manifest.parts(unit)
        check_graph(content[unit.onnx], external_tensors(parts), str(directory / unit.onnx))
        try:
            return backend.load(content[unit.onnx], *mapped_parts(parts, content))
        except GocError as cause:
            raise type(cause)(f"{directory / unit.onnx}: {cause}") from cause

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        content = dict(zip(paths, pool.map(verified, paths), strict=True))
        units, predict, segments = (
            dict(zip(kind, pool.map(loaded, kind.values()), strict=True))
            for kind in (graphs.units, graphs.predict, graphs.segments)
        )
    stored = None
    if manifest.captions:
        stored = captions_from_bytes(
            content[manifest.captions], manifest.model, f"{directory / manifest.captions}"
        )
    memory.return_free_pages(content.values())
    weights_and_graphs = {path: content[path] for path in content if path != manifest.captions}
    return Engines(
        units,
        {**predict, **graphs.predictors},
        stored,
        segments,
        Weights(manifest, weights_and_graphs),
    )


def _listed(directory: Path, graphs: Mapping[str, str], signatures: Iterable[str]) -> list[str]:
    """Distinct signatures, whose graphs the manifest lists."""
    found = sorted(set(signatures))
    missing = [signature for signature in found if signature not in graphs]
    if missing:
        raise EngineDirError(
            f"{directory} lists no graph for {missing[0]!r}, which a plan needs; add the plan again"
        )
    return found


def _launched_units(manifest: Manifest, plans: Sequence[Plan]) -> Iterable[str]:
    """Units of the blocks that plans launch by themselves; without plans, all."""
    names = manifest.model.unit_names
    ops = [op for plan in plans for step in plan.launches for op in step]
    return {names[op.unit] for op in ops if isinstance(op, Compute)} if plans else names


def _check_memory(
    manifest: Manifest,
    plan: Plan,
    images: int,
    sessions: int,
    footprint: Footprint,
    available: int | None,
) -> None:
    """Report what a plan takes, and refuse it before anything is allocated.

    Raises:
        ResourceError: the device has less than that free.
    """
    buffers = planned_bytes(manifest.model, manifest.precision, plan, images)
    needed = footprint.weights + sessions * (footprint.scratch + buffers)
    parts = (
        f"{needed / 1e9:.2f} GB: {footprint.weights / 1e9:.2f} GB of weights, and for each of {sessions} sessions of "
        f"{images} images {buffers / 1e9:.2f} GB of buffers and {footprint.scratch / 1e9:.2f} GB of scratch memory"
    )
    logger.info("plan %s takes %s", plan.name, parts)
    if available is not None and needed > available:
        raise ResourceError(
            f"plan {plan.name} needs {parts}, but {available / 1e9:.2f} GB are available; use a smaller batch size"
        )
