"""Engines in an engine directory: which are missing, their build, and their verification.

A TensorRT engine is executable code. It counts as existing only if the manifest lists it under the
key of the requested recipe and its bytes have the listed size and SHA-256. Any other engine is
built again from the ONNX file.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Protocol

from goc_deploy.disk import check_free_space, directory_lock, disk_errors
from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.engine_dir.editing import Amendment, amended
from goc_deploy.engine_dir.keys import Target
from goc_deploy.engine_dir.manifest import EngineEntry, FileEntry
from goc_deploy.engines.tensorrt.build import BuildReport
from goc_deploy.engines.tensorrt.builder import Builder
from goc_deploy.engines.tensorrt.caches import cache_path, driver_version, gpu_name
from goc_deploy.engines.tensorrt.jobs import Job, embedded_weights, wanted_engines
from goc_deploy.engines.tensorrt.library import Library, library_from_backend, target_from_options
from goc_deploy.engines.tensorrt.timing_cache import TimingCache
from goc_deploy.errors import ConflictError, EngineDirError, GocError
from goc_deploy.options import EngineOptions, Progress

logger = logging.getLogger(__name__)

BUILD_WAIT_SECONDS = 6 * 3600.0  # wait for another process that builds for the same target
MAGIC = {"tensorrt-rtx": b"vtrt"}  # first bytes of an engine, as far as they are known


class EngineBuilder(Protocol):
    """Builds engines; `goc_deploy.engines.tensorrt.builder.Builder` does so in processes."""

    def build(self, directory: EngineDir, job: Job) -> tuple[Job, bytes, BuildReport]:
        """Build the engine of a job.

        Returns:
            The job that was built, which may lack the plugin; the engine; and the report of
            the build.
        """


OpenBuilder = Callable[[EngineDir], AbstractContextManager[EngineBuilder]]


def build_engines(
    directory: EngineDir, options: EngineOptions, progress: Progress, gpu: int = 0
) -> tuple[EngineDir, int]:
    """Build the missing engines of a directory; each is usable as soon as it is built.

    Args:
        directory: the engine directory.
        options: which engines are wanted.
        progress: called with (what, done, total).
        gpu: number of the GPU that ``tensorrt`` builds on, of those that this process may see.

    Returns:
        The directory after the build, and the number of engines that were built.

    Raises:
        UsageError: the library cannot build for a capability.
        EnvironmentUnsupportedError: the library is missing, or refuses a unit.
        ConflictError, ResourceError: the directory changes during the build, or is not writable.
        EngineDirError, SafetyError: the directory is corrupt.
    """
    library = library_from_backend(options.backend)
    precision = directory.manifest.precision
    target = target_from_options(library, options.capabilities, precision, gpu)

    @contextmanager
    def open_builder(opened: EngineDir) -> Iterator[Builder]:
        with ExitStack() as stack:
            timings = _timing_cache(opened, library, target, gpu)
            yield Builder(library.backend, stack, timings, gpu)

    return build_missing(directory, target, options, progress, open_builder)


def build_missing(
    directory: EngineDir,
    target: Target,
    options: EngineOptions,
    progress: Progress,
    open_builder: OpenBuilder,
) -> tuple[EngineDir, int]:
    """Build the engines of a target that a directory lacks, by a builder of the caller.

    Args:
        directory: the engine directory.
        target: the GPUs, the library and the platform to build for.
        options: which engines are wanted.
        progress: called with (what, done, total).
        open_builder: opens a builder for the directory, which is closed at the end. It is not
            called if no engine is missing.

    Returns:
        The directory with the engines, and the number of engines that were built.

    Raises:
        ConflictError, ResourceError: the directory changes meanwhile, or cannot be written.
        EngineDirError, SafetyError: the directory is corrupt.
    """
    path = directory.path
    with disk_errors(f"writing {path}"):
        (path / "engines").mkdir(exist_ok=True)
    with directory_lock(path / target.folder, BUILD_WAIT_SECONDS), ExitStack() as stack:
        latest = directory = EngineDir.open(path)  # another process may have built meanwhile
        jobs = wanted_engines(directory, target, options)
        missing = [job for job in jobs if not is_there(directory, job)]
        check_free_space(path / target.folder, _estimated_bytes(directory, missing))
        if missing:
            builder = stack.enter_context(open_builder(directory))
        for index, job in enumerate(missing):
            progress(f"building {job.unit.name}", len(jobs) - len(missing) + index, len(jobs))
            job, engine, report = builder.build(directory, job)
            latest = add_engine(directory, job, engine, report)
        progress("done", len(jobs), len(jobs))
    return latest, len(missing)


def _timing_cache(
    directory: EngineDir, library: Library, target: Target, gpu: int
) -> TimingCache | None:
    """Return the timings of the GPU that a library builds on; None if it builds without one."""
    if library.cross_compiles:
        return None
    return TimingCache(directory, cache_path(target, "timings", gpu_name(gpu), driver_version()))


def is_there(directory: EngineDir, job: Job) -> bool:
    """Whether a directory contains the engine of a job, undamaged."""
    engines = directory.manifest.engines
    entry = next((entry for entry in engines if job.accepts(entry, as_asked=True)), None)
    if entry is None:
        return False
    try:
        read_engine(directory, entry)
    except GocError as reason:
        logger.warning("an engine is built again: %s", reason)
        return False
    return True


def read_engine(directory: EngineDir, entry: EngineEntry) -> memoryview:
    """Read an engine and verify it against the manifest.

    Raises:
        EngineDirError: the file is missing, truncated, changed, or no engine.
        SafetyError: the file is a link, or not a regular file.
    """
    content = directory.read(entry.path)
    if not bytes(content[:8]).startswith(MAGIC.get(entry.target.backend, b"")):
        raise EngineDirError(
            f"{directory.path / entry.path} is not an engine of {entry.target.backend}; "
            "build it again"
        )
    return content


def _estimated_bytes(directory: EngineDir, jobs: list[Job]) -> int:
    paths = [path for job in jobs for path in embedded_weights(job).values()]
    return 2**20 * len(jobs) + sum(map(directory.size, paths))


def add_engine(built_from: EngineDir, job: Job, engine: bytes, report: BuildReport) -> EngineDir:
    """Add an engine; it replaces older ones that serve the same graphs in the same way.

    Args:
        built_from: the directory as it was when the graph was read.
        job: the job that was built.
        engine: content of the file.
        report: report of the build.

    Returns:
        The directory with the engine.

    Raises:
        ConflictError: a file that it was built from was replaced meanwhile, or the directory cannot
            be written.
    """
    entry = EngineEntry(
        path=job.path,
        key=job.recipe.key,
        target=job.recipe.target,
        weight_mode=job.weight_mode,
        graphs=job.served,
        kernels=report.kernels,
        plugin_layers=report.plugin_layers,
        scratch_bytes=report.scratch_bytes,
        scratch_limit_bytes=job.recipe.scratch_limit_bytes,
        optima=job.recipe.optima,
    )

    def change(current: EngineDir) -> Amendment:
        if _sources(current, job) != _sources(built_from, job):
            raise ConflictError(
                f"{current.path} was replaced while engines were built for it; run again"
            )
        replaced = {old.path for old in current.manifest.engines if _supersedes(entry, old)}
        kept = [old for old in current.manifest.engines if old.path not in {*replaced, entry.path}]
        manifest = replace(current.manifest, engines=(*kept, entry))
        return Amendment(manifest, {entry.path: engine}, replaced)

    return amended(built_from.path, f"adding an engine to {built_from.path}", change)


def _supersedes(new: EngineEntry, old: EngineEntry) -> bool:
    """Whether an older engine serves the same graphs in the same way."""
    same_way = (new.target, new.weight_mode) == (old.target, old.weight_mode)
    return same_way and not set(new.graphs).isdisjoint(old.graphs)


def _sources(directory: EngineDir, job: Job) -> set[FileEntry]:
    paths = {*job.served, *embedded_weights(job).values()}
    return {directory.file(path) for path in paths if path in directory}
