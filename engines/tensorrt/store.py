"""Engines in an engine directory: which are missing, building them, and trusting none without a check.

A TensorRT engine is executable code. It counts as there only if the manifest lists it under the key of the recipe that is
asked for and its bytes have the listed size and SHA-256; anything else is built again from the ONNX.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from goc_deploy.disk import check_free_space, directory_lock, disk_errors, replacing
from goc_deploy.engine_dir.keys import Target
from goc_deploy.engine_dir.manifest import MANIFEST_NAME, EngineEntry, FileEntry, Manifest
from goc_deploy.engine_dir.manifest_file import manifest_to_json
from goc_deploy.engine_dir.reading import file_entry, read_manifest, read_verified
from goc_deploy.engines.tensorrt.build import BuildReport
from goc_deploy.engines.tensorrt.builder import Builder
from goc_deploy.engines.tensorrt.caches import cache_path, driver_version, gpu_name
from goc_deploy.engines.tensorrt.jobs import Job, embedded_weights, wanted_engines
from goc_deploy.engines.tensorrt.library import Library, library_from_backend, target_from_options
from goc_deploy.engines.tensorrt.timing_cache import TimingCache
from goc_deploy.errors import ConflictError, EngineDirError, GocError
from goc_deploy.options import EngineOptions, Progress

logger = logging.getLogger(__name__)

BUILD_WAIT_SECONDS = 6 * 3600.0  # for another process that builds for the same target
MAGIC = {"tensorrt-rtx": b"vtrt"}  # first bytes of an engine, where they are known


def build_engines(
    directory: Path, options: EngineOptions, progress: Progress
) -> tuple[Manifest, int]:
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
            builder = Builder(library.backend, stack, _timing_cache(directory, library, target))
        for index, job in enumerate(missing):
            progress(f"building {job.unit.name}", len(jobs) - len(missing) + index, len(jobs))
            job, engine, report = builder.build(directory, manifest, job)
            latest = add_engine(directory, manifest, job, engine, report)
        progress("done", len(jobs), len(jobs))
    return latest, len(missing)


def _timing_cache(directory: Path, library: Library, target: Target) -> TimingCache | None:
    """The timings of the GPU that a library builds on; None where it builds on no GPU."""
    if library.cross_compiles:
        return None
    return TimingCache(directory, cache_path(target, "timings", gpu_name(), driver_version()))


def is_there(directory: Path, manifest: Manifest, job: Job) -> bool:
    """Whether a directory holds the engine of a job, undamaged."""
    entry = next(
        (e for e in manifest.engines if e.key == job.recipe.key and e.graphs == job.served), None
    )
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
    content = read_verified(
        directory, next(file for file in manifest.files if file.path == entry.path)
    )
    if not bytes(content[:8]).startswith(MAGIC.get(entry.target.backend, b"")):
        raise EngineDirError(
            f"{directory / entry.path} is not an engine of {entry.target.backend}; build it again"
        )
    return content


def _estimated_bytes(manifest: Manifest, jobs: list[Job]) -> int:
    sizes = {entry.path: entry.size for entry in manifest.files}
    return sum(2**20 + sum(sizes[path] for path in embedded_weights(job).values()) for job in jobs)


def add_engine(
    directory: Path, built_from: Manifest, job: Job, engine: bytes, report: BuildReport
) -> Manifest:
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
        optima=job.recipe.optima,
    )
    with directory_lock(directory), disk_errors(f"adding an engine to {directory}"):
        manifest = read_manifest(directory)
        if _sources(manifest, job) != _sources(built_from, job):
            raise ConflictError(
                f"{directory} was replaced while engines were built for it; run again"
            )
        (directory / entry.path).parent.mkdir(exist_ok=True)
        with replacing(directory / entry.path) as temporary:
            temporary.write_bytes(engine)
        replaced = {e.path for e in manifest.engines if _supersedes(entry, e)}
        kept = [file for file in manifest.files if file.path not in {*replaced, entry.path}]
        manifest = replace(
            manifest,
            engines=(
                *(e for e in manifest.engines if e.path not in {*replaced, entry.path}),
                entry,
            ),
            files=tuple(
                sorted([*kept, file_entry(directory, entry.path)], key=lambda file: file.path)
            ),
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
    wanted = {*job.served, *embedded_weights(job).values()}
    return {file for file in manifest.files if file.path in wanted}
