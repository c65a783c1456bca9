"""Backends by name, and the order in which `auto` tries them: the fastest first."""

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
    """Options of a backend.

    Attributes:
        threads: number of threads of ONNX Runtime; 0 is one per core.
        shared_pool: use one ONNX Runtime thread pool for the process.
        graphs: record CUDA graphs.
        device: ``cpu``, ``cuda``, ``cuda:1`` (of those that the process may see), or ``auto``.
        weight_mode: use TensorRT engines with ``embedded`` or ``shared`` weights; None takes those
            that exist.
    """

    threads: int = 0
    shared_pool: bool = True
    graphs: bool = True
    device: str = "auto"
    weight_mode: WeightMode | None = None

    @property
    def gpu(self) -> int:
        """Number of the GPU for backends on a GPU.

        Raises:
            UsageError: the device is unknown.
        """
        match = _DEVICE.fullmatch(self.device) if isinstance(self.device, str) else None
        if match is None:
            raise UsageError(f"there is no device {self.device!r}; use cpu, cuda, cuda:1, or auto")
        return int(match["number"] or 0)

    def allows(self, backend: str) -> bool:
        """Whether a backend runs on the requested device."""
        return self.device == "auto" or (self.device == "cpu") == (backend == "onnxruntime")


def candidates(
    name: str, directory: EngineDir, options: BackendOptions
) -> Iterator[tuple[str, Callable[[], Backend]]]:
    """Return the backends to try in turn, each with the function that makes it.

    Args:
        name: ``auto``, or one of ``FASTEST_FIRST``.
        directory: the engine directory.
        options: options of the backend.

    Raises:
        UsageError: the backend or device is unknown, or the backend does not run on the device.
    """
    if name not in ("auto", *FASTEST_FIRST):
        raise UsageError(f"there is no backend {name!r}; use auto, {', '.join(FASTEST_FIRST)}")
    assert options.gpu >= 0  # raises UsageError if the device is unknown
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
    """Make ONNX Runtime on the GPU of this machine.

    Raises:
        EnvironmentUnsupportedError: there is no GPU, or no ONNX Runtime or cuda-bindings for it.
    """
    from goc_deploy.engines import driver

    driver.device_capability(options.gpu)  # asks the driver before any large import
    from goc_deploy.engines.cuda import cuda_device
    from goc_deploy.engines.ort_cuda import OrtCudaBackend

    device = cuda_device(options.gpu, graphs=options.graphs)
    return OrtCudaBackend(device, options.threads, shared_pool=options.shared_pool)


def tensorrt_backend_here(
    name: str, directory: EngineDir, options: BackendOptions
) -> TensorrtBackend:
    """Make TensorRT or TensorRT for RTX on the GPU of this machine, with a directory's engines.

    Raises:
        EnvironmentUnsupportedError: there is no GPU, or no TensorRT or cuda-bindings for it, or an
            engine cannot be built.
        ConflictError, ResourceError, EngineDirError, SafetyError: the directory cannot be used.
    """
    from goc_deploy.engines import driver

    capability = driver.device_capability(options.gpu)  # asks the driver before any large import
    from goc_deploy.engines.cuda import cuda_device
    from goc_deploy.engines.tensorrt.library import library_from_backend
    from goc_deploy.engines.tensorrt.selection import tensorrt_backend
    from goc_deploy.engines.tensorrt.store import build_engines

    library, device = library_from_backend(name), cuda_device(options.gpu, graphs=options.graphs)
    build, mode = partial(build_engines, gpu=options.gpu), options.weight_mode
    return tensorrt_backend(directory, library, capability, device, weight_mode=mode, build=build)


def onnxruntime_backend(options: BackendOptions) -> Backend:
    """Make ONNX Runtime on the CPU."""
    from goc_deploy.engines.ort import OrtBackend

    return OrtBackend(options.threads, shared_pool=options.shared_pool)


def explanation(backend: str, passed_over: dict[str, str]) -> str:
    """Explain in a sentence why `auto` chose a backend; equal reasons appear once."""
    names_of: dict[str, list[str]] = {}
    for name, reason in passed_over.items():
        names_of.setdefault(reason, []).append(name)
    reasons = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in names_of.items())
    return f"backend {backend} is the fastest that works here" + (f"; {reasons}" if reasons else "")
