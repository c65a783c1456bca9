"""Engines in an engine directory: which are missing, building them, and trusting none without a check.

A TensorRT engine is executable code. It counts as there only if the manifest lists it under the key of the recipe that is
asked for and its bytes have the listed size and SHA-256; anything else is built again from the ONNX.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Set
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from goc_deploy.engine_dir import load_plan
from goc_deploy.engine_keys import Recipe, Target, dimension_ranges
from goc_deploy.engines import tensorrt_graphs as graphs
from goc_deploy.engines.plugin.stacking import KERNEL_SHA256, stack_updates
from goc_deploy.engines.tensorrt_build import BuildReport, BuildRequest
from goc_deploy.engines.tensorrt_library import library_from_backend, target_from_options
from goc_deploy.engines.tensorrt_process import BuildProcess, BuildProcessDied, build_process
from goc_deploy.errors import ConflictError, EngineDirError, EnvironmentUnsupportedError, GocError
from goc_deploy.graph_check import check_graph, external_tensors
from goc_deploy.manifest import MANIFEST_NAME, EngineEntry, FileEntry, Manifest, Unit, manifest_to_json
from goc_deploy.options import EngineOptions, Progress
from goc_deploy.passes import with_stacks
from goc_deploy.publish import (
    check_free_space,
    directory_lock,
    disk_errors,
    file_entry,
    read_manifest,
    read_verified,
    replacing,
)

logger = logging.getLogger(__name__)

BUILD_WAIT_SECONDS = 6 * 3600.0  # for another process that builds for the same target
MAGIC = {"tensorrt-rtx": b"vtrt"}  # first bytes of an engine, where they are known


@dataclass(frozen=True, slots=True)
class Job:
    """An engine that should be there.

    Attributes:
        recipe: what it is built from.
        unit: the first unit that it serves.
        served: ONNX files that it serves.
        shapes: of its dynamic inputs.
        weights: ``embedded``, ``shared``, or ``none``.
        parts: units whose weights the graph of ``unit`` has, by prefix.
    """

    recipe: Recipe
    unit: Unit
    served: tuple[str, ...]
    shapes: graphs.Shapes
    weights: str
    parts: Mapping[str, Unit]

    @property
    def name(self) -> str:
        """For messages."""
        return self.unit.name + (f" and {len(self.served) - 1} like it" if len(self.served) > 1 else "")

    @property
    def path(self) -> str:
        """Of the engine file."""
        return f"{self.recipe.target.folder}/{self.unit.name}-{self.recipe.key[:12]}.engine"


def build_engines(directory: Path, options: EngineOptions, progress: Progress) -> tuple[Manifest, int]:
    """Build the engines of a directory that are missing; each is there as soon as it is built.

    Returns:
        The manifest as it is then, and how many were built.

    Raises:
        UsageError: capabilities that the library cannot build for.
        EnvironmentUnsupportedError: the library is missing, or refuses a unit.
        ConflictError, ResourceError: the directory changes meanwhile, or cannot be written.
        EngineDirError, SafetyError: the directory is corrupt.
    """
    library = library_from_backend(options.backend)
    target = target_from_options(library, options.capabilities, read_manifest(directory).precision)
    with disk_errors(f"writing {directory}"):
        (directory / "engines").mkdir(exist_ok=True)
    with directory_lock(directory / target.folder, BUILD_WAIT_SECONDS), ExitStack() as stack:
        latest = manifest = read_manifest(directory)
        jobs = wanted_engines(directory, manifest, target, options)
        missing = [job for job in jobs if not is_there(directory, manifest, job)]
        check_free_space(directory / target.folder, _estimated_bytes(manifest, missing))
        if missing:
            builder = _Builder(library.backend, stack)
        for index, job in enumerate(missing):
            progress(f"building {job.unit.name}", len(jobs) - len(missing) + index, len(jobs))
            job, engine, report = builder.build(directory, manifest, job)
            latest = add_engine(directory, manifest, job, engine, report)
        progress("done", len(jobs), len(jobs))
    return latest, len(missing)


def wanted_engines(directory: Path, manifest: Manifest, target: Target, options: EngineOptions) -> list[Job]:
    """One job per engine: per unit, or per kind of unit where weights are shared, and per segment.

    Predict graphs that plans launch only where their predictions are spread over steps (`Backend.stacks`) get none. A
    segment whose weights are more than one graph can hold reads them at an address in both weight modes.
    """
    plans = [load_plan(directory, manifest, entry.name) for entry in manifest.plans]
    ranges = dimension_ranges(manifest.model, manifest.max_batch, max((plan.steps for plan in plans), default=1))
    launched = {signature for plan in plans for signature in with_stacks(plan, manifest.model).signatures}
    not_launched = {signature for plan in plans for signature in plan.signatures} - launched
    files = {entry.path: entry for entry in manifest.files}
    jobs: dict[str, Job] = {}
    for unit in _units(manifest, not_launched):
        where = f"{directory / unit.onnx}"
        content, parts = read_verified(directory, files[unit.onnx]), manifest.parts(unit)
        check_graph(content, external_tensors(parts), where)
        model = graphs.model_from_bytes(content, where)
        held = [files[part.weights] for part in parts.values() if part.weights and not part.weights_are_inputs]
        fits = len(held) == 1 or sum(file.size for file in held) <= graphs.MAX_GRAPH_BYTES
        embeds = options.weights == "embedded" and bool(held) and fits
        (graphs.drop_weight_places if embeds else graphs.share_weights)(model)
        stacked = stack_updates(model) if options.plugin else 0
        shapes, used = graphs.input_shapes(model, ranges, where)
        recipe = Recipe(
            graph_sha256=hashlib.sha256(graphs.graph_bytes(model)).hexdigest(),
            weights_sha256=_digest_of_all(held) if embeds else None,
            target=target,
            ranges=used,
            workspace_bytes=options.workspace_bytes,
            plugin_sha256=KERNEL_SHA256 if stacked else None,
        )
        known = jobs.get(recipe.key)
        served = (*(known.served if known else ()), unit.onnx)
        weights = "embedded" if embeds else "shared" if parts else "none"
        first, parts = (known.unit, known.parts) if known else (unit, parts)
        jobs[recipe.key] = Job(recipe, first, served, shapes, weights, parts)
    return list(jobs.values())


def _digest_of_all(files: list[FileEntry]) -> str:
    """The digest of a file, or of the digests of several."""
    digests = [file.sha256 for file in files]
    return digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()


def _units(manifest: Manifest, without: Set[str]) -> Iterator[Unit]:
    """Every graph but some predict graphs."""
    skipped = {manifest.predict[signature] for signature in without}
    yield from (unit for unit in manifest.graphs() if unit.onnx not in skipped)


def is_there(directory: Path, manifest: Manifest, job: Job) -> bool:
    """Whether a directory holds the engine of a job, undamaged."""
    entry = next((e for e in manifest.engines if e.key == job.recipe.key and e.graphs == job.served), None)
    if entry is None:
        return False
    try:
        read_engine(directory, manifest, entry)
    except GocError as reason:
        logger.warning("an engine is built again: %s", reason)
        return False
    return True


def read_engine(directory: Path, manifest: Manifest, entry: EngineEntry) -> memoryview:
    """The bytes of an engine, verified against the manifest.

    Raises:
        EngineDirError: missing, truncated, changed, or no engine.
        SafetyError: a link, or not a regular file.
    """
    content = read_verified(directory, next(file for file in manifest.files if file.path == entry.path))
    if not bytes(content[:8]).startswith(MAGIC.get(entry.target.backend, b"")):
        raise EngineDirError(f"{directory / entry.path} is not an engine of {entry.target.backend}; build it again")
    return content


class _Builder:
    """Builds in processes of its own: one with the plugin, one without."""

    def __init__(self, backend: str, stack: ExitStack) -> None:
        self._backend, self._stack = backend, stack
        self._processes: dict[bool, BuildProcess] = {}

    def build(self, directory: Path, manifest: Manifest, job: Job) -> tuple[Job, bytes, BuildReport]:
        """Build a job; where the plugin cannot be used, from the function bodies.

        Returns:
            The job that was built, the engine, and what came of it.

        Raises:
            EnvironmentUnsupportedError: naming the unit, the op and the reason.
        """
        try:
            return (job, *self._build(_graph(directory, manifest, job), job))
        except EnvironmentUnsupportedError as cause:
            if job.recipe.plugin_sha256 is None:
                raise
            logger.warning("%s; it is built from the function bodies instead, which takes more launches", cause)
        job = replace(job, recipe=replace(job.recipe, plugin_sha256=None))
        return (job, *self._build(_graph(directory, manifest, job), job))

    def _build(self, graph: bytes, job: Job) -> tuple[bytes, BuildReport]:
        target, uses_plugin = job.recipe.target, job.recipe.plugin_sha256 is not None
        if uses_plugin not in self._processes:
            process = build_process(self._backend, plugin=uses_plugin)
            self._processes[uses_plugin] = self._stack.enter_context(process)
        where = f"unit {job.name}: {target.backend} {target.version} for {', '.join(target.capabilities)}"
        where += " with the plugin" if uses_plugin else ""
        try:
            request = BuildRequest(job.shapes, target.capabilities, job.recipe.workspace_bytes)
            engine, report = self._processes[uses_plugin].build(graph, request)
        except BuildProcessDied as death:
            del self._processes[uses_plugin]
            raise EnvironmentUnsupportedError(f"{where} cannot be built: {death}") from death
        if report.refusal:
            raise EnvironmentUnsupportedError(f"{where} cannot be built: {report.refusal}")
        return engine, report


def _graph(directory: Path, manifest: Manifest, job: Job) -> bytes:
    """The graph as the parser takes it."""
    files, where = {entry.path: entry for entry in manifest.files}, f"{directory / job.unit.onnx}"
    model = graphs.model_from_bytes(read_verified(directory, files[job.unit.onnx]), where)
    if job.recipe.weights_sha256 is None:
        graphs.share_weights(model)
    for prefix, path in _embedded(job).items():
        part, weights = job.parts[prefix], read_verified(directory, files[path])
        graphs.embed_weights(model, part.parameters, weights, part.precision, where, prefix)
    if job.recipe.plugin_sha256 is not None:
        stack_updates(model)
    return graphs.graph_bytes(model)


def _embedded(job: Job) -> dict[str, str]:
    """Prefix -> weights file that an engine holds."""
    if job.recipe.weights_sha256 is None:
        return {}
    return {prefix: part.weights for prefix, part in job.parts.items() if part.weights}


def _estimated_bytes(manifest: Manifest, jobs: list[Job]) -> int:
    sizes = {entry.path: entry.size for entry in manifest.files}
    return sum(2**20 + sum(sizes[path] for path in _embedded(job).values()) for job in jobs)


def add_engine(directory: Path, built_from: Manifest, job: Job, engine: bytes, report: BuildReport) -> Manifest:
    """Add an engine: its file first, the manifest that lists it last, each in one step. It replaces older ones.

    Raises:
        ConflictError: what it was built from was replaced meanwhile, or the directory cannot be written.
    """
    entry = EngineEntry(
        path=job.path,
        key=job.recipe.key,
        target=job.recipe.target,
        weights=job.weights,
        graphs=job.served,
        kernels=report.kernels,
        plugin_layers=report.plugin_layers,
        activation_bytes=report.activation_bytes,
        workspace_bytes=job.recipe.workspace_bytes,
    )
    with directory_lock(directory), disk_errors(f"adding an engine to {directory}"):
        manifest = read_manifest(directory)
        if _sources(manifest, job) != _sources(built_from, job):
            raise ConflictError(f"{directory} was replaced while engines were built for it; run again")
        (directory / entry.path).parent.mkdir(exist_ok=True)
        with replacing(directory / entry.path) as temporary:
            temporary.write_bytes(engine)
        replaced = {e.path for e in manifest.engines if _supersedes(entry, e)}
        kept = [file for file in manifest.files if file.path not in {*replaced, entry.path}]
        manifest = replace(
            manifest,
            engines=(*(e for e in manifest.engines if e.path not in {*replaced, entry.path}), entry),
            files=tuple(sorted([*kept, file_entry(directory, entry.path)], key=lambda file: file.path)),
        )
        with replacing(directory / MANIFEST_NAME) as temporary:
            temporary.write_text(manifest_to_json(manifest), encoding="utf-8")
        for path in replaced - {entry.path}:
            (directory / path).unlink(missing_ok=True)
    return manifest


def _supersedes(new: EngineEntry, old: EngineEntry) -> bool:
    """Whether an older engine serves the same graphs in the same way."""
    same_way = (new.target, new.weights) == (old.target, old.weights)
    return same_way and not set(new.graphs).isdisjoint(old.graphs)


def _sources(manifest: Manifest, job: Job) -> set[FileEntry]:
    wanted = {*job.served, *_embedded(job).values()}
    return {file for file in manifest.files if file.path in wanted}
