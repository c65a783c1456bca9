"""A CUDA device by torch, which owns memory, streams, events and graphs. Nothing here knows what an engine is."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from goc_deploy.errors import EnvironmentUnsupportedError, ResourceError
from goc_deploy.protocols import (
    ALIGNMENT,
    DTYPE_BYTES,
    NUMPY_DTYPES,
    Buffer,
    Launch,
    float32_from_bfloat16,
    stored_values,
)


def cuda_device(*, graphs: bool = True) -> CudaDevice:
    """The first CUDA device that this process may see (``CUDA_VISIBLE_DEVICES`` chooses).

    Args:
        graphs: record steps as CUDA graphs; off, every launch is made by itself.

    Raises:
        EnvironmentUnsupportedError: there is no torch, or none with CUDA, or no device.
    """
    try:
        import torch
    except ImportError as cause:
        raise EnvironmentUnsupportedError(f"torch, which owns GPU memory, cannot be imported ({cause})") from cause
    if not torch.cuda.is_available():
        raise EnvironmentUnsupportedError(
            f"torch {torch.__version__} finds no CUDA device; install a CUDA build of torch that fits the driver"
        )
    return CudaDevice(torch, torch.device("cuda", 0), graphs=graphs)


class CudaDevice:
    """See `goc_deploy.protocols.Device`."""

    kind = "cuda"

    def __init__(self, torch: Any, device: Any, *, graphs: bool) -> None:
        self._torch, self._device, self._graphs = torch, device, graphs

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        """New memory; torch aligns it to 512 bytes.

        Raises:
            ResourceError: the device has not that much.
        """
        nbytes = math.prod(shape) * DTYPE_BYTES[dtype]
        try:
            memory = self._torch.empty(max(nbytes, 1), dtype=self._torch.uint8, device=self._device)
        except self._torch.cuda.OutOfMemoryError as cause:
            raise ResourceError(
                f"{nbytes / 1e9:.2f} GB cannot be allocated on the GPU; use a smaller batch size, or end what else uses it"
            ) from cause
        assert memory.data_ptr() % ALIGNMENT == 0
        return Buffer(memory.data_ptr(), tuple(shape), dtype, memory)

    def stream(self) -> CudaStream:
        """A new stream."""
        return CudaStream(self._torch, self._device, graphs=self._graphs)

    def free_bytes(self) -> int | None:
        """What the driver has, and what torch keeps and does not use."""
        cuda = self._torch.cuda
        kept = cuda.memory_reserved(self._device) - cuda.memory_allocated(self._device)
        return int(cuda.mem_get_info(self._device)[0]) + int(kept)

    def describe(self) -> dict[str, Any]:
        """Name and compute capability of the GPU, and whether steps are recorded."""
        major, minor = self._torch.cuda.get_device_capability(self._device)
        name = self._torch.cuda.get_device_name(self._device)
        return {"device": name, "compute_capability": f"{major}.{minor}", "cuda_graphs": self._graphs}


class CudaStream:
    """See `goc_deploy.protocols.Stream`."""

    def __init__(self, torch: Any, device: Any, *, graphs: bool) -> None:
        self._torch, self._graphs = torch, graphs
        self._stream = torch.cuda.Stream(device)
        self.handle = int(self._stream.cuda_stream)
        self._events: list[Any] = []
        self._lock = threading.RLock()

    def held(self) -> AbstractContextManager[Any]:
        """See `goc_deploy.protocols.Stream.held`."""
        return self._lock

    def upload(self, values: np.ndarray, target: Buffer) -> None:
        """Copy from pageable memory: CUDA returns once it has read the values."""
        stored = stored_values(values, target.dtype)
        assert stored.nbytes == target.nbytes, (stored.shape, target)
        if not stored.flags.writeable:  # torch warns about memory that it must not write to
            stored = stored.copy()
        source = self._torch.from_numpy(stored.reshape(-1).view(np.uint8))
        with self._torch.cuda.stream(self._stream):
            _bytes_of(target).copy_(source, non_blocking=True)

    def download(self, source: Buffer) -> np.ndarray:
        """Wait, and copy to the host."""
        with self._torch.cuda.stream(self._stream):
            stored = _bytes_of(source).cpu()
        values: np.ndarray = stored.numpy().view(NUMPY_DTYPES[source.dtype]).reshape(source.shape)
        return float32_from_bfloat16(values) if source.dtype == "bfloat16" else values

    def copy(self, source: Buffer, target: Buffer) -> None:
        """Copy on the device."""
        with self._torch.cuda.stream(self._stream):
            _bytes_of(target).copy_(_bytes_of(source), non_blocking=True)

    def wait(self) -> None:
        """Wait for everything on the stream."""
        self._stream.synchronize()

    def recorded(self, launches: Sequence[Launch]) -> Sequence[Launch]:
        """Capture the launches into a CUDA graph. Other threads may allocate meanwhile."""
        if not self._graphs:
            return launches
        self.wait()
        graph = self._torch.cuda.CUDAGraph()
        with self._torch.cuda.stream(self._stream):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                for launch in launches:
                    launch()
            finally:
                graph.capture_end()

        def replay() -> None:
            with self._torch.cuda.stream(self._stream):
                graph.replay()

        return (replay,)

    def mark(self, index: int) -> None:
        """Record an event; it is made when it is first used."""
        if index == len(self._events):
            self._events.append(self._torch.cuda.Event(enable_timing=True))
        self._events[index].record(self._stream)

    def marked_ms(self, count: int) -> list[float]:
        """What the events say, which count time on the device."""
        self.wait()
        return [float(self._events[0].elapsed_time(event)) for event in self._events[:count]]


def _bytes_of(buffer: Buffer) -> Any:
    """The buffer as a torch tensor of bytes on the same memory."""
    start = buffer.pointer - buffer.owner.data_ptr()
    return buffer.owner[start : start + buffer.nbytes]
