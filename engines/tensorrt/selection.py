"""From an engine directory to a TensorRT backend: which of its engines this machine may run, and building what lacks.

An engine is used only if its key is the one that its graph, weights and target give, its bytes have the listed digest, and
its target is this library, version, platform and GPU. Whatever is missing is built from the ONNX first.
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
from goc_deploy.options import EngineOptions, Progress, no_progress
from goc_deploy.protocols import Device

logger = logging.getLogger(__name__)

Build = Callable[[EngineDir, EngineOptions, Progress], tuple[EngineDir, int]]


@dataclass(frozen=True, slots=True)
class Selection:
    """Engines of one target and weight mode.

    Attributes:
        options: what builds them.
        engines: ONNX file -> its engine, listed under the right key; the bytes are not read yet.
        missing: ONNX files that have none.
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
    weights: str | None = None,
    build: Build = build_engines,
    progress: Progress = no_progress,
) -> TensorrtBackend:
    """The backend of an engine directory, once all its engines are there.

    Args:
        directory: the engine directory.
        library: which TensorRT.
        capability: of the GPU, such as ``8.9``.
        device: the GPU.
        weights: ``embedded`` or ``shared`` engines; None takes those that lack least.
        build: builds what is missing.
        progress: of that.

    Raises:
        EnvironmentUnsupportedError: the library has no target for the GPU, or an engine cannot be built.
        ConflictError, ResourceError: it cannot be written.
        EngineDirError, SafetyError: the directory is corrupt.
    """
    check_target(library, capability, directory.manifest.precision)
    chosen = best_selection(directory, library, capability, weights)
    content, damaged = _contents(directory, chosen)
    if chosen.missing or damaged:
        logger.warning(
            "%s: %d of %d graphs have no %s engine for this GPU, so they are built now, once (goc-plan --backend %s builds them ahead)",
            *(
                directory.path,
                len(chosen.missing) + damaged,
                len(chosen.engines) + len(chosen.missing),
                library.backend,
            ),
            library.backend,
        )
        directory, _ = build(directory, chosen.options, progress)
        chosen = best_selection(directory, library, capability, weights)
        content, damaged = _contents(directory, chosen)
        if chosen.missing or damaged:
            raise EnvironmentUnsupportedError(
                f"{directory.path}: {library.backend} engines are missing right after they were built, "
                f"first for {[*chosen.missing, *chosen.engines][0]}; is another program changing the directory?"
            )
    engines = {
        directory.sha256(graph): content[entry.path] for graph, entry in chosen.engines.items()
    }
    target = next(iter(chosen.engines.values())).target
    report = {"engine_target": target.folder, "engine_weights": chosen.options.weights}
    kernels = None
    if library.compiles_at_load:
        kernels = KernelCache(
            directory, cache_path(target, "kernels", device.describe()["device"], driver_version())
        )
    return TensorrtBackend(library, device, engines, report, kernels)


def best_selection(
    directory: EngineDir, library: Library, capability: str, weights: str | None = None
) -> Selection:
    """Of all engines that this machine may run, those of the target and weight mode that lack least."""
    selections = []
    for target, options in _ways(directory.manifest, library, capability, weights):
        selections.append(selection(directory, target, options))
        if not selections[-1].missing:  # each reads every graph of the directory
            break
    return min(selections, key=lambda one: len(one.missing))  # the first of equals


def _ways(
    manifest: Manifest, library: Library, capability: str, weights: str | None
) -> Iterator[tuple[Target, EngineOptions]]:
    """What is in the directory for this machine, then what would be built by default."""
    here = (library.backend, library.version, this_platform(), capability)
    listed = dict.fromkeys(
        (engine.target, engine.weights)
        for engine in manifest.engines
        if engine.weights in (WEIGHT_MODES if weights is None else (weights,))
        and engine.target.refusal(*here) is None
    )
    for target, mode in sorted(
        listed, key=lambda way: way[1]
    ):  # embedded before shared: fewer kernels
        for plugin in (True, False):
            yield target, EngineOptions(library.backend, target.capabilities, mode, plugin=plugin)
    usual = EngineOptions(library.backend, (capability,))
    yield Target(*here[:3], (capability,)), replace(usual, weights=weights or usual.weights)


def selection(directory: EngineDir, target: Target, options: EngineOptions) -> Selection:
    """The engines that are listed for a target, by the keys that they must have."""
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


def _contents(directory: EngineDir, chosen: Selection) -> tuple[dict[str, StoredEngine], int]:
    """The verified bytes of the chosen engines by path, and how many are damaged."""
    content: dict[str, StoredEngine] = {}
    entries = {entry.path: entry for entry in chosen.engines.values()}
    for path, entry in entries.items():
        try:
            uses_plugin = entry.plugin_layers > 0
            read = read_engine(directory, entry)
            content[path] = StoredEngine(
                path,
                read,
                uses_plugin,
                reads_first=uses_plugin or entry.kernels == 1,
                reads_weights=entry.weights == "shared",
                scratch_bytes=entry.activation_bytes or 0,
            )
        except GocError as reason:
            logger.warning("an engine is not loaded: %s", reason)
    return content, len(entries) - len(content)
