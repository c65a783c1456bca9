"""Loading an engine directory: verify its files, load its engines, share them in pipelines."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from numbers import Integral
from types import MappingProxyType

from goc_deploy.compiler import Plan
from goc_deploy.compiler.modulation_file import CONDITIONING
from goc_deploy.conditions.stored_captions import captions_from_bytes
from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.engine_dir.manifest import GraphEntry, Manifest
from goc_deploy.errors import (
    EnvironmentUnsupportedError,
    ResourceError,
    UsageError,
)
from goc_deploy.host_memory import return_free_pages
from goc_deploy.options import History, Offload
from goc_deploy.precision import DTYPE_OF_PRECISION
from goc_deploy.protocols import Backend, Engine, Footprint
from goc_deploy.runtime.buffers import planned_bytes
from goc_deploy.runtime.decoder import LatentDecoder
from goc_deploy.runtime.history import plan_to_run
from goc_deploy.runtime.model_engines import Engines
from goc_deploy.runtime.modulation_tables import ModulationTables
from goc_deploy.runtime.needed_graphs import needed_graphs
from goc_deploy.runtime.pipeline import Attached, Pipeline
from goc_deploy.runtime.text_loading import load_graph, load_text_encoder, text_graphs
from goc_deploy.runtime.video_decoder import VideoDecoder
from goc_deploy.runtime.weights import Weights

logger = logging.getLogger(__name__)

MAX_SESSIONS = 1024


@dataclass(frozen=True, slots=True)
class UnlistedPlans:
    """Plans that are not in the engine directory.

    Attributes:
        plans: plans by the name or SPEC that selects them.
        predict_graph: returns the ONNX file of a predict signature.
    """

    plans: Mapping[str, Plan]
    predict_graph: Callable[[str], bytes]


def load_pipelines(
    directory: EngineDir,
    backend: Backend,
    names: Sequence[str | None],
    batch_size: int | None,
    max_sessions: int,
    *,
    all_units: bool = False,
    unlisted: UnlistedPlans | None = None,
    history: History = "auto",
    offload: Offload = "none",
) -> list[Pipeline]:
    """Load an engine directory once, for one or more of its plans.

    Args:
        directory: the engine directory.
        backend: loads the graphs and owns the buffers.
        names: plans by name or SPEC; None is the first plan that caches.
        batch_size: images per run; None is the ``max_batch`` of the engine directory.
        max_sessions: sessions of each pipeline.
        all_units: whether units that none of these plans launches are loaded too, for
            `Pipeline.with_plan`.
        unlisted: plans that are not in the engine directory.
        history: see `goc_deploy.runtime.history.plan_to_run`.
        offload: whether the text encoders are freed when they have no work.

    Raises:
        EngineDirError, SafetyError: the engine directory is corrupt or not from this package.
        UsageError: there is no such plan, it cannot keep such a history, or a number is out of
            range.
        ResourceError: the buffers do not fit into memory.
    """
    manifest, others = directory.manifest, unlisted.plans if unlisted else {}
    images = _checked_images(manifest, batch_size, max_sessions)
    plans = [
        others[name] if name is not None and name in others else directory.plan(name)
        for name in names
    ]
    new_graphs = unlisted is not None
    plans = [
        plan_to_run(plan, manifest, backend, images, history, makes_graphs=new_graphs)
        for plan in plans
    ]
    more = _more_graphs(manifest, plans, offload, all_units=all_units)
    new = _new_predict_engines(manifest, plans, unlisted.predict_graph, backend) if unlisted else {}
    graphs = needed_graphs(directory, plans, backend, more, new).all
    memory = _memory(directory, graphs, backend, offload)
    for plan in plans:
        _check_memory(manifest, plan, images, max_sessions, memory)
    engines = load_engines(directory, plans, backend, more, new)
    attached = Attached(
        _decoder(manifest, engines, backend),
        load_text_encoder(directory, None if offload == "text" else engines.units, backend),
    )
    return [
        Pipeline(manifest, plan, engines, backend, images, max_sessions, attached) for plan in plans
    ]


def _checked_images(manifest: Manifest, batch_size: int | None, max_sessions: int) -> int:
    """The images per run.

    Raises:
        UsageError: a number is out of range.
    """
    for option, value in (("max_sessions", max_sessions), ("batch_size", batch_size)):
        if value is not None and (not isinstance(value, Integral) or isinstance(value, bool)):
            raise UsageError(f"{option} must be a whole number, got {value!r:.60}")
    if max_sessions is None or not 1 <= max_sessions <= MAX_SESSIONS:
        raise UsageError(
            f"max_sessions must be at least 1 and at most {MAX_SESSIONS}, got {max_sessions}"
        )
    images = manifest.max_batch if batch_size is None else batch_size
    if not 1 <= images <= manifest.max_batch:
        raise UsageError(
            f"batch size {images} must be within 1..{manifest.max_batch}, the limit that "
            "the engine directory was exported for (`max_batch`)"
        )
    return images


def _more_graphs(
    manifest: Manifest, plans: Sequence[Plan], offload: Offload, *, all_units: bool
) -> list[str]:
    """Names of the graphs to load that the plans do not launch."""
    decoders = {"decoder": manifest.decoder, "video_decoder": manifest.video_decoder}
    more = [name for name, part in decoders.items() if part]
    if offload != "text":
        more += manifest.text_encoders
    if all_units:
        more += [CONDITIONING, *manifest.model.unit_names]
        more += [replace(plan.sampler, head=None).graph for plan in plans]
    return more


def _new_predict_engines(
    manifest: Manifest,
    plans: Sequence[Plan],
    predict_graph: Callable[[str], bytes],
    backend: Backend,
) -> dict[str, Engine]:
    """Engines of those predict signatures of plans that have no graph in the engine directory.

    Raises:
        EnvironmentUnsupportedError: the backend only runs engines that were built before.
    """
    dtype = DTYPE_OF_PRECISION[manifest.precision]
    signatures = {signature for plan in plans for signature in plan.signatures}
    missing = [
        s
        for s in sorted(signatures - manifest.predict.keys())
        if backend.predict_engine(s, dtype) is None
    ]
    if missing and backend.stacks:
        raise EnvironmentUnsupportedError(
            "it runs engines that were built for a plan of the directory, and this plan is not "
            "there; add it with goc plan"
        )
    return {s: backend.load(memoryview(predict_graph(s)), {}) for s in missing}


def _decoder(
    manifest: Manifest, engines: Engines, backend: Backend
) -> LatentDecoder | VideoDecoder | None:
    if manifest.video_decoder is not None:
        height, width = manifest.model.largest.sample[-2:]
        engine = engines.units["video_decoder"]
        return VideoDecoder(engine, backend, manifest.video_decoder, (height, width))
    if manifest.decoder is None:
        return None
    return LatentDecoder(engines.units["decoder"], backend, manifest.decoder, manifest.model)


def _weights_of(directory: EngineDir, graphs: Sequence[GraphEntry]) -> dict[str, dict[str, int]]:
    """The argument of `Backend.footprint`: graph digest -> weights file -> size in bytes."""
    parts = {unit.onnx: directory.manifest.parts(unit).values() for unit in graphs}
    return {
        directory.sha256(onnx): {
            part.weights_file: directory.size(part.weights_file)
            for part in of_graph
            if part.weights_file
        }
        for onnx, of_graph in parts.items()
    }


def load_engines(
    directory: EngineDir,
    plans: Sequence[Plan],
    backend: Backend,
    more: Iterable[str] = (),
    predict_engines: Mapping[str, Engine] = MappingProxyType({}),
) -> Engines:
    """Verify all files of the `needed_graphs`, then check and load the graphs, both in parallel.

    The arguments are those of `needed_graphs`.

    Raises:
        EngineDirError, SafetyError: a file is missing, corrupt or not from this package, or a graph
            reads more than its weights.
    """
    manifest = directory.manifest
    graphs = needed_graphs(directory, plans, backend, more, predict_engines)
    weights = {
        part.weights_file
        for unit in graphs.all
        for part in manifest.parts(unit).values()
        if part.weights_file
    }
    captions = {manifest.stored_captions} if manifest.stored_captions else set()
    paths = sorted({unit.onnx for unit in graphs.all} | weights | captions)

    def loaded(unit: GraphEntry) -> Engine:
        return load_graph(directory, unit, content, backend)

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        content = dict(zip(paths, pool.map(directory.read, paths), strict=True))
        units, predict, segments = (
            dict(zip(kind, pool.map(loaded, kind.values()), strict=True))
            for kind in (graphs.units, graphs.predict, graphs.segments)
        )
    stored = None
    if manifest.stored_captions:
        stored = captions_from_bytes(
            content[manifest.stored_captions],
            manifest.model,
            f"{directory.path / manifest.stored_captions}",
        )
    return_free_pages(content.values())
    weights_and_graphs = {
        path: content[path] for path in content if path != manifest.stored_captions
    }
    return Engines(
        units,
        {**predict, **graphs.predict_engines},
        stored,
        segments,
        Weights(directory, weights_and_graphs),
        ModulationTables(directory, plans, backend, units),
    )


@dataclass(frozen=True, slots=True)
class Memory:
    """The memory that engines need, and what the device has.

    Attributes:
        models: all engines except those of text encoders.
        encoders: the engines of text encoders.
        about: what the log and errors call the latter.
        available: free bytes of the device, or None if they are not known.
    """

    models: Footprint
    encoders: Footprint
    about: str
    available: int | None


def _memory(
    directory: EngineDir, graphs: Sequence[GraphEntry], backend: Backend, offload: Offload
) -> Memory:
    """The memory that the engines of graphs will need, and what is free."""
    manifest = directory.manifest
    models = [graph for graph in graphs if graph.name not in manifest.text_encoders]
    return Memory(
        backend.footprint(_weights_of(directory, models)),
        backend.footprint(_weights_of(directory, text_graphs(manifest))),
        "of text encoders" + (" while they encode" if offload == "text" else ""),
        backend.device.free_bytes(),
    )


def _check_memory(
    manifest: Manifest, plan: Plan, images: int, sessions: int, memory: Memory
) -> None:
    """Log the memory that a plan needs, and check it before anything is allocated.

    Raises:
        ResourceError: the device does not have that much free memory.
    """
    buffers = planned_bytes(manifest.model.largest, manifest.precision, plan, images)
    weights, available = memory.models.weights, memory.available
    of_text, scratch = memory.encoders, memory.models.scratch
    encoders = of_text.weights + of_text.scratch
    needed = weights + encoders + sessions * (scratch + buffers)
    text = f", {encoders / 1e9:.2f} GB {memory.about}" if manifest.text_encoders else ""
    parts = (
        f"{needed / 1e9:.2f} GB: {weights / 1e9:.2f} GB of weights{text}, and for each of "
        f"{sessions} sessions of {images} images {buffers / 1e9:.2f} GB of buffers and "
        f"{scratch / 1e9:.2f} GB of scratch memory"
    )
    logger.info("plan %s in the form %s takes %s", plan.name, plan.form, parts)
    logger.info("plan %s has this form because: %s", plan.name, plan.form_reason)
    if available is not None and needed > available:
        raise ResourceError(
            f"plan {plan.name} needs {parts}, but {available / 1e9:.2f} GB are available; use a "
            "smaller batch size"
        )
