"""Memory, a stream and recorded launches on a GPU for tests, by cuda-bindings alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


class CudaMemory:
    """The first GPU, with its primary context, which stays for the kernels that are loaded into it.

    Raises:
        RuntimeError: there is no driver or no GPU.
    """

    def __init__(self) -> None:
        from cuda.bindings import driver as cu

        self._cu: Any = cu
        self._call("cuInit", 0)
        self._call(
            "cuCtxSetCurrent", self._call("cuDevicePrimaryCtxRetain", self._call("cuDeviceGet", 0))
        )
        self._stream = self._call("cuStreamCreate", int(cu.CUstream_flags.CU_STREAM_NON_BLOCKING))
        self._kept: list[Any] = []
        self.stream = int(self._stream)

    def _call(self, name: str, *arguments: Any) -> Any:
        status, *values = getattr(self._cu, name)(*arguments)
        if status != self._cu.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"{name}: {status.name}")
        return values[0] if values else None

    def put(self, array: np.ndarray) -> int:
        """Address of a copy of the array, until `free`."""
        array = np.ascontiguousarray(array)
        memory = self._call("cuMemAlloc", array.nbytes)
        self._kept.append(memory)
        self._call("cuMemcpyHtoD", memory, array.ctypes.data, array.nbytes)
        self._call("cuCtxSynchronize")
        return int(memory)

    def get(self, address: int, like: np.ndarray) -> np.ndarray:
        """Wait, and copy what lies at an address, with the shape and type of an array."""
        found = np.empty(like.shape, like.dtype)
        self._call("cuStreamSynchronize", self._stream)
        self._call("cuMemcpyDtoH", found.ctypes.data, self._cu.CUdeviceptr(address), found.nbytes)
        return found

    def recorded(self, launches: Sequence[Callable[[], None]]) -> Callable[[], None]:
        """Launches as one CUDA graph; the returned function replays it on the stream."""
        mode = self._cu.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call("cuStreamBeginCapture", self._stream, mode)
        for launch in launches:
            launch()
        graph = self._call("cuGraphInstantiate", self._call("cuStreamEndCapture", self._stream), 0)
        return lambda: self._call("cuGraphLaunch", graph, self._stream)

    def free(self) -> None:
        """Free what was put there."""
        self._call("cuStreamSynchronize", self._stream)
        while self._kept:
            self._call("cuMemFree", self._kept.pop())
