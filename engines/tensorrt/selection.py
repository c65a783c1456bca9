"""The TensorRT backend of an engine directory: it selects engines and builds missing ones.

An engine is used only if its key follows from its graph, weights and target, its bytes have the
listed digest, and its target is this library, version, platform and GPU. Missing engines are first
built from the ONNX files.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.engine_dir.keys import WEIGHT_MODES, Target
from goc_deploy.engine_dir.manifest import EngineEntry, Manifest
from goc_deploy.engines.tensorrt.backend import TensorrtBackend
from goc_deploy.engines.tensorrt.caches import cache_path, driver_version
from goc_deploy.engines.tensorrt.engine import StoredEngine
from goc_deploy.engines.tensorrt.jobs import wanted_engines
from goc_deploy.engines.tensorrt.kernel_cache import KernelCache
from goc_deploy.engines.tensorrt.library import Library, check_target, this_platform
from goc_deploy.engines.tensorrt.store import build_engines, read_engine
from goc_deploy.errors import EnvironmentUnsupportedError, GocError
from goc_deploy.options import EngineOptions, Progress, WeightMode, no_progress
from goc_deploy.protocols import Device

logger = logging.getLogger(__name__)

Build = Callable[[EngineDir, EngineOptions, Progress], tuple[EngineDir, int]]


@dataclass(frozen=True, slots=True)
class Selection:
    """Engines of one target and weight mode.

    Attributes:
        options: options that build them.
        engines: ONNX file -> its engine with the right key; the bytes are not read yet.
        missing: ONNX files without an engine.
    """

    options: EngineOptions
    engines: Mapping[str, EngineEntry]
    missing: tuple[str, ...]


def tensorrt_backend(
    directory: EngineDir,
    library: Library,
    capability: str,
    device: Device,
    *,
    weight_mode: WeightMode | None = None,
    build: Build = build_engines,
    progress: Progress = no_progress,
) -> TensorrtBackend:
    """Make the backend of an engine directory, after all its engines exist.

    Args:
        directory: the engine directory.
        library: the TensorRT library.
        capability: compute capability of the GPU, such as ``8.9``.
        device: the GPU.
        weight_mode: ``embedded`` or ``shared``; None takes the mode with fewest missing engines.
        build: function that builds missing engines.
        progress: progress of that function.

    Raises:
        EnvironmentUnsupportedError: the library has no target for the GPU, or an engine cannot be
            built.
        ConflictError, ResourceError: the directory cannot be written.
        EngineDirError, SafetyError: the directory is corrupt.
    """
    check_target(library, capability, directory.manifest.precision)
    usable = best_selection(directory, library, capability, weight_mode)
    content, damaged = _contents(directory, usable)
    if usable.missing or damaged:
        _warn_of_builds(directory, usable, damaged, library.backend)
        directory, _ = build(directory, usable.options, progress)
        usable = best_selection(directory, library, capability, weight_mode)
        content, damaged = _contents(directory, usable)
        if usable.missing or damaged:
            raise EnvironmentUnsupportedError(
                f"{directory.path}: {library.backend} engines are missing right after they were "
                f"built, first for {[*usable.missing, *usable.engines][0]}; is another program "
                "changing the directory?"
            )
    engines = {
        directory.sha256(graph): content[entry.path] for graph, entry in usable.engines.items()
    }
    target = next(iter(usable.engines.values())).target
    report = {"engine_target": target.folder, "engine_weights": usable.options.weight_mode}
    kernels = None
    if library.compiles_at_load:
        kernels = KernelCache(
            directory, cache_path(target, "kernels", device.describe()["device"], driver_version())
        )
    return TensorrtBackend(library, device, engines, report, kernels)


def _warn_of_builds(directory: EngineDir, usable: Selection, damaged: int, backend: str) -> None:
    """Log how many engines are built now, because they are missing or damaged."""
    logger.warning(
        "%s: %d of %d graphs have no %s engine for this GPU, so they are built now, once "
        "(goc-plan --backend %s builds them ahead)",
        directory.path,
        len(usable.missing) + damaged,
        len(usable.engines) + len(usable.missing),
        backend,
        backend,
    )


def best_selection(
    directory: EngineDir,
    library: Library,
    capability: str,
    weight_mode: WeightMode | None = None,
) -> Selection:
    """Select the target and weight mode with the fewest missing engines for this machine."""
    selections = []
    for target, options in _ways(directory.manifest, library, capability, weight_mode):
        selections.append(selection(directory, target, options))
        if not selections[-1].missing:  # the next selection would read every graph again
            break
    return min(selections, key=lambda one: len(one.missing))  # the first of equal ones


def _ways(
    manifest: Manifest, library: Library, capability: str, weight_mode: WeightMode | None
) -> Iterator[tuple[Target, EngineOptions]]:
    """Yield the targets in the directory that fit this machine, then the default target."""
    here = (library.backend, library.version, this_platform(), capability)
    listed = dict.fromkeys(
        (engine.target, engine.weight_mode)
        for engine in manifest.engines
        if engine.weight_mode in (WEIGHT_MODES if weight_mode is None else (weight_mode,))
        and engine.target.refusal(*here) is None
    )
    # Embedded weights come before shared ones, because they need fewer kernels.
    for target, mode in sorted(listed, key=lambda way: way[1]):
        for plugin in (True, False):
            yield target, EngineOptions(library.backend, target.capabilities, mode, plugin=plugin)
    usual = EngineOptions(library.backend, (capability,))
    yield (
        Target(*here[:3], (capability,)),
        replace(usual, weight_mode=weight_mode or usual.weight_mode),
    )


def selection(directory: EngineDir, target: Target, options: EngineOptions) -> Selection:
    """Select the listed engines of a target by the keys that they must have."""
    engines: dict[str, EngineEntry] = {}
    missing: list[str] = []
    listed = directory.manifest.engines
    for job in wanted_engines(directory, target, options):
        entry = next((entry for entry in listed if job.accepts(entry, as_asked=False)), None)
        if entry is None:
            missing += job.served
        else:
            engines.update(dict.fromkeys(job.served, entry))
    return Selection(options, engines, tuple(missing))


def _contents(directory: EngineDir, usable: Selection) -> tuple[dict[str, StoredEngine], int]:
    """Read the bytes of the usable engines by path; also return how many are damaged."""
    content: dict[str, StoredEngine] = {}
    entries = {entry.path: entry for entry in usable.engines.values()}
    for path, entry in entries.items():
        try:
            uses_plugin = entry.plugin_layers > 0
            read = read_engine(directory, entry)
            content[path] = StoredEngine(
                path,
                read,
                uses_plugin,
                reads_first=uses_plugin or entry.kernels == 1,
                reads_weights=entry.weight_mode == "shared",
                scratch_bytes=entry.scratch_bytes or 0,
            )
        except GocError as reason:
            logger.warning("an engine is not loaded: %s", reason)
    return content, len(entries) - len(content)
