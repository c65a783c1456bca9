"""Engines for other weights: copied from an engine directory that has the same graphs.

An engine with shared weights holds none, so it serves every directory whose graphs are equal. The
key of an engine's recipe is a digest of its graph without weights, among others. A copied engine
therefore has the key that this directory's own graph leads to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.engine_dir.keys import Recipe, Target
from goc_deploy.engine_dir.manifest import EngineEntry
from goc_deploy.engines.tensorrt.build import BuildReport
from goc_deploy.engines.tensorrt.caches import keep_cache, read_cache
from goc_deploy.engines.tensorrt.jobs import Job, wanted_engines
from goc_deploy.engines.tensorrt.store import build_missing, read_engine
from goc_deploy.errors import UsageError
from goc_deploy.options import EngineOptions, ExportOptions, Progress

SHOWN_GRAPHS = 5


@dataclass(frozen=True, slots=True)
class _Copies:
    """An `goc_deploy.engines.tensorrt.store.EngineBuilder` that copies instead of building.

    Attributes:
        source: the engine directory with the engines.
        engines: key of a job's recipe -> the engine that does the job, and its recipe.
    """

    source: EngineDir
    engines: Mapping[str, tuple[EngineEntry, Recipe]]

    def opened(self, _directory: EngineDir) -> AbstractContextManager[_Copies]:
        """Do without the processes that a builder opens."""
        return nullcontext(self)

    def build(
        self,
        directory: EngineDir,  # noqa: ARG002 (a builder needs it)
        job: Job,
    ) -> tuple[Job, bytes, BuildReport]:
        """Copy the engine of a job, verified against the manifest of its directory."""
        entry, recipe = self.engines[job.recipe.key]
        report = BuildReport(
            kernels=entry.kernels,
            plugin_layers=entry.plugin_layers,
            scratch_bytes=entry.scratch_bytes,
        )
        return replace(job, recipe=recipe), bytes(read_engine(self.source, entry)), report


def check_source(source: EngineDir, output: Path, options: ExportOptions) -> None:
    """Check, before an export, that a directory may have engines for it.

    Raises:
        UsageError: it has no engines with shared weights, is the output, or has another precision
            or largest batch.
    """
    manifest = source.manifest
    if source.path.resolve() == output.resolve():
        raise UsageError("`reuse_engines` is the output itself; export to another directory")
    if not _targets(source):
        raise UsageError(
            f"{source.path} has no TensorRT engines with shared weights, so none can be reused; "
            "build some with `EngineOptions.weight_mode=shared`"
        )
    built_for = f"`precision={manifest.precision}` and `max_batch={manifest.max_batch}`"
    if (manifest.precision, manifest.max_batch) != (options.precision, options.max_batch):
        raise UsageError(
            f"the engines of {source.path} cannot be reused, they were built for {built_for}, and "
            f"the export has `precision={options.precision}` and `max_batch={options.max_batch}`"
        )


def copy_engines(path: Path, source: EngineDir, progress: Progress) -> tuple[EngineDir, int]:
    """Copy the engines with shared weights, and the caches of their targets.

    Args:
        path: the engine directory that gets them.
        source: the engine directory that has them.
        progress: called with (what, done, total).

    Returns:
        The directory with the engines, and the number of engines that were copied.

    Raises:
        UsageError: a graph of the directory has no engine there; then nothing is copied.
        ConflictError, ResourceError: the directory cannot be written.
        EngineDirError, SafetyError: a directory is corrupt.
    """
    directory = EngineDir.open(path)
    reusable = {target: _engines(directory, source, target) for target in _targets(source)}
    copied = 0
    for target, (options, copies) in reusable.items():
        directory, count = build_missing(directory, target, options, progress, copies.opened)
        copied += count
        for file in source.manifest.files:
            is_cache = file.path.startswith(f"{target.folder}/") and file.path.endswith(".cache")
            if is_cache and file.path not in directory:
                keep_cache(path, file.path, read_cache(source, file.path))
    return EngineDir.open(path), copied


def _targets(source: EngineDir) -> list[Target]:
    """The targets that have engines with shared weights."""
    engines = source.manifest.engines
    return list(dict.fromkeys(e.target for e in engines if e.weight_mode == "shared"))


def _engines(
    directory: EngineDir, source: EngineDir, target: Target
) -> tuple[EngineOptions, _Copies]:
    """Find an engine for every graph of a directory, built with the plugin or without.

    Returns:
        The options by which the jobs are listed, and the engines.
    """
    missing: list[list[Job]] = []
    for plugin in (True, False):
        options = EngineOptions(
            target.backend, target.capabilities, weight_mode="shared", plugin=plugin
        )
        jobs = wanted_engines(directory, target, options)
        engines = {
            job.recipe.key: (entry, recipe)
            for job in jobs
            for entry in source.manifest.engines
            if (recipe := job.recipe_of(entry, as_asked=False)) is not None
        }
        missing.append([job for job in jobs if job.recipe.key not in engines])
        if not missing[-1]:
            return options, _Copies(source, engines)
    names = [job.name for job in min(missing, key=len)]
    more = f" and {len(names) - SHOWN_GRAPHS} more" if len(names) > SHOWN_GRAPHS else ""
    reasons = "; ".join(_differences(directory, source)) or "their graphs differ"
    raise UsageError(
        f"the engines of {source.path} cannot be reused for {directory.path}, which stays without: "
        f"there is none for {', '.join(names[:SHOWN_GRAPHS])}{more} ({reasons}); export with the "
        "same options and plans, or build engines with `EngineOptions.backend`"
    )


def _differences(directory: EngineDir, source: EngineDir) -> Iterator[str]:
    """Differences that may explain why graphs or their sizes are not equal."""
    own, theirs = asdict(directory.manifest.model), asdict(source.manifest.model)
    for name in ("precision", "max_batch"):
        own[name] = getattr(directory.manifest, name)
        theirs[name] = getattr(source.manifest, name)
    for of, opened in ((own, directory), (theirs, source)):
        plans = opened.plans()
        of["largest number of steps"] = max((plan.steps for plan in plans), default=0)
        of["plans"] = ", ".join(sorted(plan.name for plan in plans))
    for name, value in own.items():
        if theirs[name] != value:
            yield f"{name}: {value}, there {theirs[name]}"
