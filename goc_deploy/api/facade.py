"""The public functions: what each needs is imported when it is called."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from goc_deploy.errors import ConflictError, EnvironmentUnsupportedError, UsageError
from goc_deploy.options import EngineOptions, ExportOptions, PlanOptions, Progress, no_progress

if TYPE_CHECKING:
    from goc_deploy.engine_dir.manifest import Manifest, PlanEntry
    from goc_deploy.engines.choice import BackendOptions
    from goc_deploy.engines.tensorrt.verify import Difference
    from goc_deploy.policies.calibration import CalibrationOptions, Laboratory
    from goc_deploy.protocols import Backend
    from goc_deploy.runtime.loading import UnlistedPlans
    from goc_deploy.runtime.pipeline import Pipeline


MAX_THREADS = 1024  # each takes memory, and ONNX Runtime has no limit
PATH_OPTIONS = ("captions", "text_encoder", "vae")

logger = logging.getLogger(__name__)


def export(
    checkpoint: str | Path, output: str | Path, *, progress: Progress = no_progress, **options: Any
) -> Manifest:
    """Export a checkpoint to an engine directory.

    Args:
        checkpoint: ``.pt``, ``.pth`` or ``.safetensors``, a folder that diffusers saved, or its id on the Hugging Face Hub.
        output: directory to make; it appears whole or not at all.
        progress: called with (what, done, total).
        **options: fields of `goc_deploy.options.ExportOptions`.

    Returns:
        The manifest of the directory.

    Raises:
        GocError: a subclass says what is wrong and has an ``exit_code``.
    """
    if "plans" in options:
        options["plans"] = tuple(options["plans"])
    options |= {name: Path(options[name]) for name in PATH_OPTIONS if options.get(name) is not None}
    return export_with(Path(checkpoint), Path(output), ExportOptions(**options), progress)[0]


def export_with(
    checkpoint: Path, output: Path, options: ExportOptions, progress: Progress = no_progress
) -> tuple[Manifest, bool]:
    """`export` with its options in one object; also says whether anything was written."""
    from goc_deploy.disk import check_parent

    check_parent(output)  # before torch is imported
    _require("export", "torch", "onnx", "onnxscript", "safetensors")
    if options.text_encoder is not None:
        _require("text", "tokenizers")
    from goc_deploy.api.laboratory import engine_laboratory
    from goc_deploy.exporters.export import export_checkpoint

    backend = cpu_backend()

    def laboratory(directory: Path, sampler: str, calibration: CalibrationOptions) -> Laboratory:
        return engine_laboratory(directory, lambda: backend, sampler, calibration, progress)

    return export_checkpoint(checkpoint, output, options, backend, laboratory, progress)


def check_engine_options(options: EngineOptions, precision: str) -> None:
    """Check that engines can be built here, before anything else is done.

    Raises:
        UsageError: GPUs that the backend cannot build for, or that lack the precision.
        EnvironmentUnsupportedError: a package, a driver or a GPU is missing.
    """
    _require("rtx" if options.backend == "tensorrt-rtx" else "tensorrt", "onnx", "polygraphy")
    from goc_deploy.engines.tensorrt.library import library_from_backend, target_from_options

    target_from_options(library_from_backend(options.backend), options.capabilities, precision)


def build_engines(
    engine_dir: str | Path, options: EngineOptions, progress: Progress = no_progress
) -> tuple[Manifest, int]:
    """Build the TensorRT engines of an engine directory that are missing, stale or damaged.

    Args:
        engine_dir: what `export` made.
        options: which, and for what.
        progress: called with (what, done, total).

    Returns:
        The manifest, and how many engines were built.

    Raises:
        GocError: a subclass says what is wrong and has an ``exit_code``.
    """
    _require("rtx" if options.backend == "tensorrt-rtx" else "tensorrt", "onnx", "polygraphy")
    from goc_deploy.engines.tensorrt.store import build_engines as build

    return build(Path(engine_dir), options, progress)


def check_gpu() -> None:
    """Check that there is a GPU, before anything that needs one is begun.

    Raises:
        EnvironmentUnsupportedError: there is no driver, or no GPU.
    """
    from goc_deploy.engines.driver import device_capability

    device_capability()


def verify_engines(
    engine_dir: str | Path, options: EngineOptions, progress: Progress = no_progress
) -> list[Difference]:
    """Run every graph of an engine directory on TensorRT and on ONNX Runtime's CPU provider, and compare.

    Args:
        engine_dir: what `export` made.
        options: the backend, and how its engines hold their weights.
        progress: called with (what, done, total).

    Returns:
        The difference of each graph.

    Raises:
        VerificationError: one is beyond tolerance.
        EnvironmentUnsupportedError: there is no GPU, or TensorRT does not work on it.
    """
    from goc_deploy.engines.choice import BackendOptions, tensorrt_backend_here
    from goc_deploy.engines.tensorrt.verify import verify_engines as verify

    backend = tensorrt_backend_here(
        options.backend, Path(engine_dir), BackendOptions(weights=options.weights)
    )
    return verify(Path(engine_dir), backend, cpu_backend(), progress)


def load(
    engine_dir: str | Path,
    *,
    backend: str = "auto",
    plan: str | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    max_sessions: int = 1,
    threads: int = 0,
    shared_pool: bool = True,
    cuda_graphs: bool = True,
    device: str = "auto",
) -> Pipeline:
    """Load an engine directory.

    Args:
        engine_dir: what `export` made.
        backend: ``tensorrt``, ``tensorrt-rtx``, ``onnxruntime-cuda``, ``onnxruntime``, or ``auto``, the first of these that
            works; the log and the report say why others do not. TensorRT engines that are missing are built first.
        plan: name or SPEC; default: the first plan that caches. A SPEC that learns nothing from images need not be in the
            directory: it is compiled here, for TensorRT only where the directory has engines of its predictions.
        steps: sampling steps, if others than the plan's; such a plan is compiled here too.
        batch_size: images per run, at most the engine's ``max_batch`` (the default).
        max_sessions: callers that run at the same time; each session has its own buffers.
        threads: size of the thread pool; 0 is one per core.
        shared_pool: one ONNX Runtime thread pool for the process, which is faster. Other sessions that your program
            makes then need ``SessionOptions.use_per_session_threads = False``; turn this off where that is not possible.
        cuda_graphs: record CUDA graphs, on TensorRT of whole steps the second time they run for a batch shape, on ONNX Runtime
            of each session; off, for debugging.
        device: ``cpu``, ``cuda``, or ``cuda:1`` for another GPU than the first; ``auto`` leaves it to the backend.

    Raises:
        GocError: a subclass says what is wrong and has an ``exit_code``.
    """
    from goc_deploy.engines.choice import BackendOptions

    options = BackendOptions(threads, shared_pool, cuda_graphs, device)
    directory, unlisted = Path(engine_dir), None
    if plan is not None or steps is not None:
        plan, unlisted = _plan_on_the_fly(directory, plan, steps)
    return _load(directory, backend, options, [plan], batch_size, max_sessions, unlisted=unlisted)[
        0
    ]


def _plan_on_the_fly(
    directory: Path, plan: str | None, steps: int | None
) -> tuple[str | None, UnlistedPlans | None]:
    """The name to load, and the plan of that name if the directory does not hold it."""
    from goc_deploy.api.plans import plan_on_the_fly
    from goc_deploy.engine_dir.reading import read_manifest
    from goc_deploy.runtime.loading import UnlistedPlans

    try:
        found = plan_on_the_fly(directory, plan, steps)
    except ModuleNotFoundError as cause:  # of a router that torch saved
        _require("export", cause.name or "torch")
        raise
    if found is None:
        return plan, None
    manifest = read_manifest(directory)

    def graph(signature: str) -> bytes:
        _require("export", "onnx")
        from goc_deploy.exporters.graphs.cache_update import predict_graph

        content: bytes = predict_graph(
            signature, manifest.model, manifest.precision
        ).SerializeToString()
        return content

    return found[0], UnlistedPlans(dict([found]), graph)


def load_plans(
    engine_dir: str | Path,
    plans: Sequence[str],
    *,
    backend: str = "auto",
    batch_size: int | None = None,
    max_sessions: int = 1,
    threads: int = 0,
    shared_pool: bool = True,
    cuda_graphs: bool = True,
    device: str = "auto",
    all_units: bool = False,
) -> list[Pipeline]:
    """Load several plans of one engine directory, such as tiers of quality, on one set of weights.

    Args:
        engine_dir: what `export` made.
        plans: names or SPECs.
        backend, batch_size, threads, shared_pool, cuda_graphs, device: as `load` takes them.
        max_sessions: callers of each pipeline that run at the same time.
        all_units: also load units that none of these plans launches, for `goc_deploy.runtime.pipeline.Pipeline.with_plan`.

    Returns:
        A pipeline for each plan, in their order. Each is closed by itself.

    Raises:
        GocError: a subclass says what is wrong and has an ``exit_code``.
    """
    from goc_deploy.engines.choice import BackendOptions

    options = BackendOptions(threads, shared_pool, cuda_graphs, device)
    return _load(
        Path(engine_dir), backend, options, plans, batch_size, max_sessions, all_units=all_units
    )


def _load(
    engine_dir: Path,
    name: str,
    options: BackendOptions,
    plans: Sequence[str | None],
    batch_size: int | None,
    max_sessions: int,
    *,
    all_units: bool = False,
    unlisted: UnlistedPlans | None = None,
) -> list[Pipeline]:
    """Load on the backend of that name, or on the first that works."""
    _require(None, "onnxruntime")
    if not isinstance(options.threads, int) or options.threads > MAX_THREADS:
        raise UsageError(
            f"threads must be a whole number and at most {MAX_THREADS}, got {options.threads!r:.60}"
        )
    from goc_deploy.engines.choice import candidates, explanation
    from goc_deploy.runtime.loading import load_pipelines

    passed_over: dict[str, str] = {}
    choices = list(candidates(name, engine_dir, options))
    for candidate, make in choices:
        try:
            backend = make()
            backend.passed_over = passed_over
            pipelines = load_pipelines(
                engine_dir,
                backend,
                plans,
                batch_size,
                max_sessions,
                all_units=all_units,
                unlisted=unlisted,
            )
        except (EnvironmentUnsupportedError, ConflictError) as reason:
            if candidate == choices[-1][0]:
                raise
            passed_over[candidate] = str(reason)
            continue
        if name == "auto":
            logger.info(explanation(candidate, passed_over))
        return pipelines
    raise AssertionError("the last candidate loads or raises")


def add_plan(
    engine_dir: str | Path,
    spec: str,
    *,
    name: str | None = None,
    steps: int | None = None,
    sampler: str | None = None,
    progress: Progress = no_progress,
    **more: Any,
) -> PlanEntry:
    """Add a plan to an engine directory.

    Args:
        engine_dir: what `export` made.
        spec: policy SPEC.
        name: default: the SPEC made file-safe.
        steps: default: the steps of the engine's first plan.
        sampler: default: the sampler of the engine's first plan.
        progress: called with (what, done, total) by policies that calibrate.
        **more: further fields of `goc_deploy.options.PlanOptions`: ``calibrate``, ``seed``, ``cfg_scale``, ``segments``.

    Raises:
        UsageError, ScheduleError: a wrong SPEC, name, step count or sampler.
        ConflictError: another plan has that name.
    """
    _require("export", "onnx", *(("torch", "safetensors") if spec.startswith("l2c:") else ()))
    from goc_deploy.api.plans import add_plan_to

    options = PlanOptions(name, steps, sampler, **more)
    return add_plan_to(Path(engine_dir), spec, options, cpu_backend, progress)


def cpu_backend() -> Backend:
    """The backend that export and calibration run on.

    Raises:
        EnvironmentUnsupportedError: ONNX Runtime is missing.
    """
    _require(None, "onnxruntime")
    from goc_deploy.engines.choice import BackendOptions, onnxruntime_backend

    return onnxruntime_backend(BackendOptions())


def _require(extra: str | None, *modules: str) -> None:
    """Raise with the command that installs what is missing."""
    from importlib.util import find_spec

    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        what = f"'goc_deploy[{extra}]'" if extra else "onnxruntime"
        raise EnvironmentUnsupportedError(
            f"this needs {', '.join(missing)}, which is not installed; run: pip install {what}"
        )
