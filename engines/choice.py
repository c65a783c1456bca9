"""Backends by name, and which of them `auto` tries: the fastest first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from goc_deploy.errors import EnvironmentUnsupportedError
from goc_deploy.protocols import Backend

if TYPE_CHECKING:
    from goc_deploy.engines.tensorrt_runtime import TensorrtBackend

FASTEST_FIRST = ("tensorrt", "tensorrt-rtx", "onnxruntime-cuda", "onnxruntime")


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How to run an engine directory.

    Attributes:
        threads: of ONNX Runtime; 0 is one per core.
        shared_pool: one ONNX Runtime thread pool for the process.
        graphs: record the steps as CUDA graphs, on TensorRT.
        weights: TensorRT engines with ``embedded`` or ``shared`` weights; None takes those that are there.
    """

    threads: int = 0
    shared_pool: bool = True
    graphs: bool = True
    weights: str | None = None


def candidates(name: str, directory: Path, options: RunOptions) -> Iterator[tuple[str, Callable[[], Backend]]]:
    """Backends to try in turn, each with what makes it.

    Args:
        name: ``auto``, or one of ``FASTEST_FIRST``.
        directory: the engine directory.
        options: how to run it.

    Raises:
        EnvironmentUnsupportedError: no such backend.
    """
    if name not in ("auto", *FASTEST_FIRST):
        raise EnvironmentUnsupportedError(f"there is no backend {name!r}; use auto, {', '.join(FASTEST_FIRST)}")
    for candidate in FASTEST_FIRST if name == "auto" else (name,):
        yield candidate, partial(_make, candidate, directory, options)


def _make(name: str, directory: Path, options: RunOptions) -> Backend:
    if name == "onnxruntime":
        return onnxruntime_backend(options)
    return (
        onnxruntime_cuda_backend(options)
        if name == "onnxruntime-cuda"
        else tensorrt_backend_here(name, directory, options)
    )


def onnxruntime_cuda_backend(options: RunOptions) -> Backend:
    """ONNX Runtime on the GPU of this machine.

    Raises:
        EnvironmentUnsupportedError: there is none, or no ONNX Runtime or torch for it.
    """
    from goc_deploy.engines.plugin import driver

    driver.device_capability()  # asks the driver, before anything large is imported
    from goc_deploy.engines.cuda import cuda_device
    from goc_deploy.engines.ort import OrtBackend

    return OrtBackend(options.threads, shared_pool=options.shared_pool, device=cuda_device(graphs=False))


def tensorrt_backend_here(name: str, directory: Path, options: RunOptions) -> TensorrtBackend:
    """TensorRT or TensorRT for RTX on the GPU of this machine, with the engines of a directory.

    Raises:
        EnvironmentUnsupportedError: there is no GPU, or no TensorRT or torch for it, or an engine cannot be built.
        ConflictError, ResourceError, EngineDirError, SafetyError: of the directory.
    """
    from goc_deploy.engines.plugin import driver

    capability = driver.device_capability()  # asks the driver, before anything large is imported
    from goc_deploy.engines.cuda import cuda_device
    from goc_deploy.engines.tensorrt_library import library_from_backend
    from goc_deploy.engines.tensorrt_select import tensorrt_backend

    library, device = library_from_backend(name), cuda_device(graphs=options.graphs)
    return tensorrt_backend(directory, library, capability, device, weights=options.weights)


def onnxruntime_backend(options: RunOptions) -> Backend:
    """ONNX Runtime on the CPU."""
    from goc_deploy.engines.ort import OrtBackend

    return OrtBackend(options.threads, shared_pool=options.shared_pool)


def explanation(chosen: str, passed_over: dict[str, str]) -> str:
    """Why `auto` chose a backend, as a sentence; equal reasons are said once."""
    names_of: dict[str, list[str]] = {}
    for name, reason in passed_over.items():
        names_of.setdefault(reason, []).append(name)
    reasons = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in names_of.items())
    return f"backend {chosen} is the fastest that works here" + (f"; {reasons}" if reasons else "")
