"""Backends, and the TensorRT engines of an engine directory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from goc_deploy.api.requirements import require
from goc_deploy.errors import ConflictError, EnvironmentUnsupportedError, UsageError
from goc_deploy.options import EngineOptions, History, Progress, no_progress
from goc_deploy.precision import Precision

if TYPE_CHECKING:
    from goc_deploy.engine_dir.directory import EngineDir
    from goc_deploy.engine_dir.manifest import Manifest
    from goc_deploy.engines.choice import BackendOptions
    from goc_deploy.engines.tensorrt.verify import Difference
    from goc_deploy.protocols import Backend
    from goc_deploy.runtime.pipeline import Pipeline

MAX_THREADS = 1024  # each takes memory, and ONNX Runtime has no limit

logger = logging.getLogger(__name__)


def cpu_backend() -> Backend:
    """The backend that export and calibration run on.

    Raises:
        EnvironmentUnsupportedError: ONNX Runtime is missing.
    """
    require(None, "onnxruntime")
    from goc_deploy.engines.choice import BackendOptions, onnxruntime_backend

    return onnxruntime_backend(BackendOptions())


def loaded_on(
    name: str,
    directory: EngineDir,
    options: BackendOptions,
    load: Callable[[Backend], list[Pipeline]],
) -> list[Pipeline]:
    """Load on the backend of that name, or with ``auto`` on the fastest one that works.

    Args:
        name: ``auto``, or a backend.
        directory: the engine directory.
        options: how to make the backend.
        load: loads pipelines on a backend.

    Raises:
        UsageError: no such backend or device, or too many threads.
        EnvironmentUnsupportedError, ConflictError: the backend, or with ``auto`` the last one,
            does not work here.
    """
    require(None, "onnxruntime")
    if not isinstance(options.threads, int) or options.threads > MAX_THREADS:
        raise UsageError(
            f"threads must be a whole number and at most {MAX_THREADS}, got {options.threads!r:.60}"
        )
    from goc_deploy.engines.choice import candidates, explanation

    passed_over: dict[str, str] = {}

    def attempt(make: Callable[[], Backend]) -> list[Pipeline]:
        backend = make()
        backend.passed_over = passed_over
        return load(backend)

    *faster, (last, make_last) = candidates(name, directory, options)
    for candidate, make in faster:
        try:
            pipelines = attempt(make)
        except (EnvironmentUnsupportedError, ConflictError) as reason:
            passed_over[candidate] = str(reason)
            continue
        logger.info(explanation(candidate, passed_over))
        return pipelines
    pipelines = attempt(make_last)
    if name == "auto":
        logger.info(explanation(last, passed_over))
    return pipelines


def loaded_plans(
    directory: EngineDir,
    plans: Sequence[str],
    backend: str,
    options: BackendOptions,
    *,
    batch_size: int | None = None,
    max_sessions: int = 1,
    all_units: bool = False,
    history: History = "auto",
) -> list[Pipeline]:
    """Load plans of an open engine directory; see `goc_deploy.load_plans`.

    Raises:
        GocError: as `goc_deploy.load_plans`.
    """

    def load_all(on: Backend) -> list[Pipeline]:
        from goc_deploy.runtime.loading import load_pipelines

        return load_pipelines(
            directory, on, plans, batch_size, max_sessions, all_units=all_units, history=history
        )

    return loaded_on(backend, directory, options, load_all)


def check_engine_options(
    options: EngineOptions, precision: Precision, *, verify: bool = False
) -> None:
    """Check that engines can be built and verified here, before anything else is done.

    Args:
        options: the backend and the GPUs to build for.
        precision: the precision of the engine directory.
        verify: whether the engines are to run on the GPU of this machine.

    Raises:
        UsageError: GPUs that the backend cannot build for, or that lack the precision.
        EnvironmentUnsupportedError: a package, a driver or a GPU is missing.
    """
    if verify:
        from goc_deploy.engines.driver import device_capability

        device_capability()
    _require_tensorrt(options)
    from goc_deploy.engines.tensorrt.library import library_from_backend, target_from_options

    target_from_options(library_from_backend(options.backend), options.capabilities, precision)


def build_engines(
    engine_dir: str | Path, options: EngineOptions, progress: Progress = no_progress
) -> tuple[Manifest, int]:
    """Build the TensorRT engines of an engine directory that are missing, stale or damaged.

    Args:
        engine_dir: the directory that `goc_deploy.export` wrote.
        options: the backend and the GPUs to build for.
        progress: called with (what, done, total).

    Returns:
        The manifest, and how many engines were built.

    Raises:
        GocError: a subclass names what is wrong and has an ``exit_code``.
    """
    _require_tensorrt(options)
    from goc_deploy.engine_dir.directory import EngineDir
    from goc_deploy.engines.tensorrt.store import build_engines as build

    directory, built = build(EngineDir.open(Path(engine_dir)), options, progress)
    return directory.manifest, built


def verify_engines(
    engine_dir: str | Path, options: EngineOptions, progress: Progress = no_progress
) -> list[Difference]:
    """Run every graph of an engine directory on TensorRT and on ONNX Runtime's CPU provider.

    Args:
        engine_dir: the directory that `goc_deploy.export` wrote.
        options: the backend, and how its engines hold their weights.
        progress: called with (what, done, total).

    Returns:
        The difference of each graph.

    Raises:
        VerificationError: a difference is beyond tolerance.
        EnvironmentUnsupportedError: there is no GPU, or TensorRT does not work on it.
    """
    from goc_deploy.engine_dir.directory import EngineDir
    from goc_deploy.engines.choice import BackendOptions, tensorrt_backend_here
    from goc_deploy.engines.tensorrt.verify import verify_engines as verify

    directory = EngineDir.open(Path(engine_dir))
    backend_options = BackendOptions(weight_mode=options.weight_mode)
    backend = tensorrt_backend_here(options.backend, directory, backend_options)
    return verify(directory, backend, cpu_backend(), progress)


def _require_tensorrt(options: EngineOptions) -> None:
    require("rtx" if options.backend == "tensorrt-rtx" else "tensorrt", "onnx", "polygraphy")
