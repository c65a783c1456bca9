"""A CUDA device by the driver: memory, streams, events and graphs. It knows nothing of engines.

Every thread works in the device's primary context, which libraries on the CUDA runtime use too.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from goc_deploy.engines.driver import Driver, capability_of, device_handle, device_name, load_driver
from goc_deploy.engines.plugin import moves as kernel_moves
from goc_deploy.engines.plugin.kernel import DeviceKernels, Geometry, cubin_for, load_kernels
from goc_deploy.errors import GocError, ResourceError
from goc_deploy.precision import DTYPE_BYTES, tensor_bytes
from goc_deploy.protocols import (
    ALIGNMENT,
    NUMPY_DTYPES,
    Buffer,
    Move,
    Run,
    Stream,
    float32_from_bfloat16,
    stored_values,
)

logger = logging.getLogger(__name__)

STAGING_BYTES = 4 * 2**20  # pinned host memory of a stream; larger copies go through it in parts

# PyTorch documents one capture at a time per process, and other libraries do not document more.
_capturing = threading.RLock()
_this_thread = threading.local()


def cuda_device(index: int = 0, *, graphs: bool = True) -> CudaDevice:
    """Open a CUDA device of those that this process may see (``CUDA_VISIBLE_DEVICES``).

    Args:
        index: number of the device.
        graphs: record steps as CUDA graphs; False makes every launch by itself.

    Raises:
        EnvironmentUnsupportedError: there is no driver, no such device, or cuda-bindings is
            missing.
    """
    return CudaDevice(load_driver(), index, graphs=graphs)


class Allocation:
    """Device memory, freed with the last buffer on it."""

    __slots__ = ("__weakref__", "pointer")

    def __init__(self, pointer: int) -> None:
        self.pointer = pointer


@dataclass(slots=True)
class GraphCounts:
    """Counts of what a device has recorded: graphs, nodes, and milliseconds of recording."""

    graphs: int = 0
    nodes: int = 0
    ms: float = 0.0


class CudaDevice:
    """See `goc_deploy.protocols.Device`."""

    kind = "cuda"
    shares_launches = True

    def __init__(self, driver: Driver, index: int, *, graphs: bool) -> None:
        self.driver, self.index, self.graphs, self.recorded = driver, index, graphs, GraphCounts()
        self._handle = device_handle(driver, index)
        self._context = driver.cuDevicePrimaryCtxRetain(self._handle)
        # What waits for the end of a capture: in its thread, these calls would break it.
        self._later: list[Callable[[], None]] = []
        self._kernels: DeviceKernels | None = None

    def enter(self) -> None:
        """Make the device's context current in this thread."""
        self.driver.cuCtxSetCurrent(self._context)

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        """Allocate memory; the driver aligns it to at least 256 bytes.

        Raises:
            ResourceError: the device has not enough memory.
        """
        nbytes = tensor_bytes(dtype, shape)
        self.enter()
        try:
            pointer = int(self.driver.cuMemAlloc(max(nbytes, 1)))
        except ResourceError as cause:
            raise ResourceError(
                f"{nbytes / 1e9:.2f} GB cannot be allocated on the GPU; use a smaller batch size, "
                "or end what else uses it"
            ) from cause
        assert pointer % ALIGNMENT == 0
        owner = Allocation(pointer)
        weakref.finalize(owner, self.dispose, self.driver.bindings.cuMemFree, pointer)
        return Buffer(pointer, tuple(shape), dtype, owner)

    def dispose(self, free: Callable[[Any], Any], handle: Any) -> None:
        """Free something; garbage that is collected in a capturing thread is freed afterwards."""

        def freed() -> None:
            with contextlib.suppress(GocError):  # at the end of the process, without the driver
                self.enter()
                free(handle)

        if getattr(_this_thread, "captures", False):
            self._later.append(freed)
        else:
            freed()

    def stream(self, *, graphs: bool = True) -> CudaStream:
        """Create a stream that no other code of the process uses.

        Args:
            graphs: record on it, if the device records at all.
        """
        return CudaStream(self, graphs=graphs and self.graphs)

    @property
    def kernels(self) -> DeviceKernels:
        """Our kernels, compiled for this device on first use.

        Raises:
            EnvironmentUnsupportedError: NVRTC is missing or refuses the code.
        """
        if self._kernels is None:
            self.enter()
            self._kernels = load_kernels(self.driver, self._cubin())
        return self._kernels

    def _cubin(self) -> bytes:
        return cubin_for(capability_of(self.driver, self._handle))

    def step_start(self, moves: Sequence[Move], step: Buffer, stream: Stream) -> Run:
        """See `goc_deploy.protocols.Device.step_start`: two kernels, or more for many moves."""
        kernels, handle = self.kernels, stream.handle
        counter = kernel_moves.CounterParameters(step.pointer)
        by_address, most = [_by_address(move) for move in moves], kernel_moves.MAX_MOVES
        parts = [by_address[first : first + most] for first in range(0, len(by_address), most)]
        launches: list[tuple[Geometry, ctypes.Structure]] = [(kernel_moves.NEXT_STEP, counter)]
        launches += [
            (kernel_moves.moves_geometry(part), kernel_moves.moves_parameters(part, step.pointer))
            for part in parts
        ]

        def run(_: Any = (moves, step)) -> None:
            for geometry, parameters in launches:
                kernels.launch(geometry, parameters, handle)

        return run

    def free_bytes(self) -> int | None:
        """Return the free memory that the driver reports."""
        self.enter()
        return int(self.driver.cuMemGetInfo()[0])

    def describe(self) -> dict[str, Any]:
        """Describe the GPU by name and compute capability, with the counts of recordings."""
        driver, recorded = self.driver, self.recorded
        return {
            "device": device_name(driver, self._handle),
            "device_index": self.index,
            "compute_capability": capability_of(driver, self._handle),
            "driver_cuda_version": driver.cuDriverGetVersion(),
            "cuda_graphs": self.graphs,
            "recorded_graphs": recorded.graphs,
            "recorded_nodes": recorded.nodes,
            "recording_ms": recorded.ms,
        }

    @contextlib.contextmanager
    def capturing(self) -> Iterator[None]:
        """Allow one capture at a time; what this thread frees meanwhile is freed afterwards."""
        with _capturing:
            _this_thread.captures = True
            try:
                yield
            finally:
                _this_thread.captures = False
                while self._later:
                    self._later.pop()()


def _by_address(move: Move) -> kernel_moves.ByteMove:
    """Convert a move to the form that the kernel takes."""
    (outer, table_rows, width), (_, batch_rows, _) = move.source.shape, move.target.shape
    item = DTYPE_BYTES[move.source.dtype]
    return kernel_moves.ByteMove(
        move.source.pointer,
        move.target.pointer,
        period=move.period,
        step_bytes=move.stride * item,
        outer=outer,
        table_rows=table_rows,
        batch_rows=batch_rows,
        row_bytes=width * item,
        rows=None if move.rows is None else move.rows.pointer,
    )


class CudaStream:
    """See `goc_deploy.protocols.Stream`."""

    def __init__(self, device: CudaDevice, *, graphs: bool) -> None:
        self._device, self._driver = device, device.driver
        bindings = device.driver.bindings
        device.enter()
        self._stream = device.driver.cuStreamCreate(
            int(bindings.CUstream_flags.CU_STREAM_NON_BLOCKING)
        )
        weakref.finalize(self, device.dispose, bindings.cuStreamDestroy, self._stream)
        self.handle = int(self._stream)
        self._events: list[Any] = []
        self._lock = threading.RLock()
        self._records = graphs
        self._staging_at = int(device.driver.cuMemHostAlloc(STAGING_BYTES, 0))
        weakref.finalize(self, device.dispose, bindings.cuMemFreeHost, self._staging_at)
        memory = (ctypes.c_uint8 * STAGING_BYTES).from_address(self._staging_at)
        self._staging, self._staged = np.ctypeslib.as_array(memory), 0

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """See `goc_deploy.protocols.Stream.held`; the device's context is current in the block."""
        with self._entered():
            yield

    @contextlib.contextmanager
    def _entered(self) -> Iterator[None]:
        """Prepare one call; between calls another thread may use the stream unless it is held."""
        with self._lock:
            self._device.enter()
            yield

    def upload(self, values: np.ndarray, target: Buffer) -> None:
        """Copy into pinned memory, from which the GPU reads later.

        The call waits only if that memory is full.
        """
        stored = stored_values(values, target.dtype)
        assert stored.nbytes == target.nbytes, (stored.shape, target)
        content = stored.reshape(-1).view(np.uint8)
        with self._entered():
            for start in range(0, len(content), STAGING_BYTES):
                part = content[start : start + STAGING_BYTES]
                if self._staged + len(part) > STAGING_BYTES:
                    self.wait()
                self._staging[self._staged : self._staged + len(part)] = part
                source = self._staging_at + self._staged
                self._driver.cuMemcpyHtoDAsync(
                    target.pointer + start, source, len(part), self._stream
                )
                self._staged += len(part)

    def download(self, source: Buffer) -> np.ndarray:
        """Wait, then copy to the host."""
        content = np.empty(source.nbytes, np.uint8)
        with self._entered():
            self.wait()
            for start in range(0, len(content), STAGING_BYTES):
                part = content[start : start + STAGING_BYTES]
                self._driver.cuMemcpyDtoHAsync(
                    self._staging_at, source.pointer + start, len(part), self._stream
                )
                self.wait()
                part[:] = self._staging[: len(part)]
        values: np.ndarray = content.view(NUMPY_DTYPES[source.dtype]).reshape(source.shape)
        return float32_from_bfloat16(values) if source.dtype == "bfloat16" else values

    def copy(self, source: Buffer, target: Buffer) -> None:
        """Copy on the device."""
        self._driver.cuMemcpyDtoDAsync(target.pointer, source.pointer, target.nbytes, self._stream)

    def wait(self) -> None:
        """Wait for everything on the stream."""
        with self._entered():
            self._driver.cuStreamSynchronize(self._stream)
            self._staged = 0

    def recorded(self, launches: Sequence[Run]) -> Sequence[Run]:
        """Capture the launches into a CUDA graph.

        If that fails, the log states why, and this stream launches one by one from then on.
        """
        if not self._records:
            return launches
        with self._entered():
            self.wait()
            started = time.perf_counter()
            try:
                graph, nodes = self._captured(launches)
            except GocError as reason:
                self._records = False
                logger.warning(
                    "steps are launched one by one, because one cannot be recorded as a CUDA "
                    "graph: %s",
                    reason,
                )
                return launches
            counts = self._device.recorded
            counts.graphs, counts.nodes = counts.graphs + 1, counts.nodes + nodes
            counts.ms += 1e3 * (time.perf_counter() - started)
        launch, stream = self._driver.cuGraphLaunch, self._stream
        return (lambda: launch(graph.handle, stream),)

    def _captured(self, launches: Sequence[Run]) -> tuple[_Graph, int]:
        """Record the launches as a graph; also return its number of nodes."""
        driver = self._driver
        # In this mode other threads may allocate.
        mode = driver.bindings.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        with self._device.capturing():
            driver.cuStreamBeginCapture(self._stream, mode)
            try:
                for launch in launches:
                    launch()
            except BaseException:
                with contextlib.suppress(GocError):  # the first failure is the reason
                    driver.cuGraphDestroy(driver.cuStreamEndCapture(self._stream))
                raise
            captured = driver.cuStreamEndCapture(self._stream)
            try:
                nodes = driver.cuGraphGetNodes(captured)[1]
                return _Graph(self._device, driver.cuGraphInstantiate(captured, 0)), int(nodes)
            finally:
                driver.cuGraphDestroy(captured)

    def interrupt(self) -> None:
        """Do nothing: what is on the stream of a GPU cannot be taken back."""

    def resume(self, *, interruptible: bool) -> None:
        """Do nothing."""

    def mark(self, index: int) -> None:
        """Record an event, which is created on first use."""
        if index == len(self._events):
            event = self._driver.cuEventCreate(
                int(self._driver.bindings.CUevent_flags.CU_EVENT_DEFAULT)
            )
            weakref.finalize(
                self, self._device.dispose, self._driver.bindings.cuEventDestroy, event
            )
            self._events.append(event)
        self._driver.cuEventRecord(self._events[index], self._stream)

    def marked_ms(self, count: int) -> list[float]:
        """Return the times of the events, which count time on the device."""
        self.wait()
        elapsed = self._driver.cuEventElapsedTime
        return [float(elapsed(self._events[0], event)) for event in self._events[:count]]


class _Graph:
    """An executable graph, destroyed with the last replay of it."""

    __slots__ = ("__weakref__", "handle")

    def __init__(self, device: CudaDevice, handle: Any) -> None:
        self.handle = handle
        weakref.finalize(self, _destroy, device, handle)


def _destroy(device: CudaDevice, handle: Any) -> None:
    with _capturing:  # destroying a graph could break a capture in another thread
        device.dispose(device.driver.bindings.cuGraphExecDestroy, handle)
