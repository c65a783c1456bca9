"""Backends by name, and which of them `auto` tries: the fastest first."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from goc_deploy.errors import UsageError
from goc_deploy.options import WeightMode
from goc_deploy.protocols import Backend

if TYPE_CHECKING:
    from goc_deploy.engine_dir.directory import EngineDir
    from goc_deploy.engines.tensorrt.backend import TensorrtBackend

_DEVICE = re.compile(r"auto|cpu|cuda(:(?P<number>[0-9]{1,3}))?")
FASTEST_FIRST = ("tensorrt", "tensorrt-rtx", "onnxruntime-cuda", "onnxruntime")


@dataclass(frozen=True, slots=True)
class BackendOptions:
    """How to make a backend.

    Attributes:
        threads: size of ONNX Runtime's thread pool; 0 is one thread per core.
        shared_pool: one ONNX Runtime thread pool for the process.
        graphs: record CUDA graphs.
        device: ``cpu``, ``cuda``, ``cuda:1`` (of those that the process may see), or ``auto``.
        weights: TensorRT engines with ``embedded`` or ``shared`` weights; None takes those that are there.
    """

    threads: int = 0
    shared_pool: bool = True
    graphs: bool = True
    device: str = "auto"
    weights: WeightMode | None = None

    @property
    def gpu(self) -> int:
        """Number of the GPU that a backend on a GPU takes.

        Raises:
            UsageError: not a device.
        """
        found = _DEVICE.fullmatch(self.device) if isinstance(self.device, str) else None
        if found is None:
            raise UsageError(f"there is no device {self.device!r}; use cpu, cuda, cuda:1, or auto")
        return int(found["number"] or 0)

    def allows(self, backend: str) -> bool:
        """Whether a backend runs on the device that is asked for."""
        return self.device == "auto" or (self.device == "cpu") == (backend == "onnxruntime")


def candidates(
    name: str, directory: EngineDir, options: BackendOptions
) -> Iterator[tuple[str, Callable[[], Backend]]]:
    """Backends to try in turn, each with what makes it.

    Args:
        name: ``auto``, or one of ``FASTEST_FIRST``.
        directory: the engine directory.
        options: how to make the backend.

    Raises:
        UsageError: no such backend or device, or a backend that does not run on the device.
    """
    if name not in ("auto", *FASTEST_FIRST):
        raise UsageError(f"there is no backend {name!r}; use auto, {', '.join(FASTEST_FIRST)}")
    assert options.gpu >= 0  # a device, or a UsageError
    if name != "auto" and not options.allows(name):
        raise UsageError(
            f"backend {name} does not run on device {options.device}; name one of the two only"
        )
    for candidate in filter(options.allows, FASTEST_FIRST) if name == "auto" else (name,):
        yield candidate, partial(_make, candidate, directory, options)


def _make(name: str, directory: EngineDir, options: BackendOptions) -> Backend:
    if name == "onnxruntime":
        return onnxruntime_backend(options)
    return (
        onnxruntime_cuda_backend(options)
        if name == "onnxruntime-cuda"
        else tensorrt_backend_here(name, directory, options)
    )


def onnxruntime_cuda_backend(options: BackendOptions) -> Backend:
    """ONNX Runtime on the GPU of this machine.

    Raises:
        EnvironmentUnsupportedError: there is none, or no ONNX Runtime or cuda-bindings for it.
    """
    from goc_deploy.engines import driver

    driver.device_capability(options.gpu)  # asks the driver, before anything large is imported
    from goc_deploy.engines.cuda import cuda_device
    from goc_deploy.engines.ort_cuda import OrtCudaBackend

    device = cuda_device(options.gpu, graphs=options.graphs)
    return OrtCudaBackend(device, options.threads, shared_pool=options.shared_pool)


def tensorrt_backend_here(
    name: str, directory: EngineDir, options: BackendOptions
) -> TensorrtBackend:
    """TensorRT or TensorRT for RTX on the GPU of this machine, with the engines of a directory.

    Raises:
        EnvironmentUnsupportedError: there is no GPU, or no TensorRT or cuda-bindings for it, or an engine cannot be built.
        ConflictError, ResourceError, EngineDirError, SafetyError: of the directory.
    """
    from goc_deploy.engines import driver

    capability = driver.device_capability(
        options.gpu
    )  # asks the driver, before anything large is imported
    from goc_deploy.engines.cuda import cuda_device
    from goc_deploy.engines.tensorrt.library import library_from_backend
    from goc_deploy.engines.tensorrt.selection import tensorrt_backend

    library, device = library_from_backend(name), cuda_device(options.gpu, graphs=options.graphs)
    return tensorrt_backend(directory, library, capability, device, weights=options.weights)


def onnxruntime_backend(options: BackendOptions) -> Backend:
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
