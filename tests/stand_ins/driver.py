"""A CUDA driver on host memory that holds programs to the rules of CUDA.

It takes the place of ``cuda.bindings.driver``.

Work is queued and done only when somebody waits, so a forgotten wait reads old bytes. Every byte
knows whether it was written; fresh and freed memory is 0xFF, which is NaN in every float type.
Addresses outside of live allocations, reads of bytes that nobody wrote, streams that race, threads
that share a stream without waiting, threads without a context, and calls that a capture forbids
raise `Fault`.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from cuda.bindings import driver as real

from goc_deploy.protocols import ALIGNMENT
from tests.stand_ins.kernels import Fault, Kernel, Span, kernel_of

POISON = 0xFF
SUCCESS = real.CUresult.CUDA_SUCCESS
OUT_OF_MEMORY = real.CUresult.CUDA_ERROR_OUT_OF_MEMORY


@dataclass(eq=False)
class Block:
    """An allocation."""

    start: int
    raw: np.ndarray
    written: np.ndarray
    freed: bool = False


@dataclass(frozen=True)
class Work:
    """An operation on a stream: its kind, the bytes that it reads and writes, its function."""

    name: str
    reads: dict[str, Span]
    writes: dict[str, Span]
    run: Callable[[], None]
    really_reads: Callable[[], dict[str, Span]] | None = None  # of what it may read, once it runs
    thread: int = field(default_factory=threading.get_ident)


class SimulatedStream:
    """What is queued, and what is being captured instead."""

    def __init__(self, driver: StandInDriver, handle: int) -> None:
        self.driver, self.handle = driver, handle
        self.pending: list[Work] = []
        self.graph: list[Work] | None = None
        self._handed_over = 0  # how many of what is pending belong to nobody any more

    def __int__(self) -> int:
        return self.handle

    def put(self, work: Work) -> None:
        if any(waiting.thread != work.thread for waiting in self.pending[self._handed_over :]):
            raise Fault(f"{work.name}: put on a stream that another thread uses")
        if self.graph is not None:
            self.graph.append(work)
            return
        self.driver.check_race(self, work)
        self.pending.append(work)

    def hand_over(self) -> None:
        """The thread that holds the stream lets another one go on behind what is queued."""
        self._handed_over = len(self.pending)

    def wait(self) -> None:
        while self.pending:
            self.driver.perform(self.pending[0])
            self.pending.pop(0)
            self._handed_over = max(0, self._handed_over - 1)


class StandInDriver:
    """Calls of the driver, each with its status first. ``calls`` records what was done.

    Attributes:
        capacity: bytes of device memory.
        refusal: status of the next instantiation of a graph, instead of success.
    """

    CUresult, CUdevice_attribute = real.CUresult, real.CUdevice_attribute
    CUstream_flags, CUevent_flags = real.CUstream_flags, real.CUevent_flags
    CUstreamCaptureMode = real.CUstreamCaptureMode

    def __init__(self, capacity: int = 2**31) -> None:
        self.capacity, self.refusal = capacity, SUCCESS
        self.blocks: list[Block] = []
        self.streams: dict[int, SimulatedStream] = {}
        self.calls: list[tuple[Any, ...]] = []
        self._pinned: dict[int, np.ndarray] = {}
        self._capturing: dict[int, SimulatedStream] = {}  # thread -> stream
        self._handles = itertools.count(1)
        self._thread = threading.local()

    # Rules

    def forbid_in_capture(self, what: str) -> None:
        if threading.get_ident() in self._capturing:
            raise Fault(f"{what}: illegal while a stream is captured")

    def need_context(self, what: str) -> None:
        if not getattr(self._thread, "context", 0):
            raise Fault(f"{what}: this thread has no context")

    def stream_of(self, handle: int | SimulatedStream) -> SimulatedStream:
        self.need_context("use a stream")
        if int(handle) not in self.streams:
            raise Fault(f"there is no stream {int(handle)}")
        return self.streams[int(handle)]

    def block_of(self, span: Span, what: str) -> tuple[Block, slice]:
        for block in self.blocks:
            if block.start <= span.start and span.end <= block.start + len(block.raw):
                if block.freed:
                    raise Fault(f"{what} lies in memory that was freed")
                return block, slice(span.start - block.start, span.end - block.start)
        raise Fault(f"{what} lies in no allocation")

    def bytes_at(self, span: Span, what: str) -> np.ndarray:
        block, place = self.block_of(span, what)
        return block.raw[place]

    def poison(self, span: Span, what: str) -> None:
        block, place = self.block_of(span, what)
        block.raw[place] = POISON
        block.written[place] = False

    def perform(self, work: Work) -> None:
        reads = work.really_reads() if work.really_reads else work.reads
        for name, span in reads.items():
            block, place = self.block_of(span, f"{work.name}: {name}")
            if not block.written[place].all():
                raise Fault(f"{work.name} reads {name}, which nobody wrote")
        work.run()
        for name, span in work.writes.items():
            block, place = self.block_of(span, f"{work.name}: {name}")
            block.written[place] = True

    def check_race(self, stream: SimulatedStream, work: Work) -> None:
        others = [other for other in list(self.streams.values()) if other is not stream]
        for waiting in (waiting for other in others for waiting in list(other.pending)):
            for mine, theirs in (
                (work.writes, {**waiting.reads, **waiting.writes}),
                (work.reads, waiting.writes),
            ):
                if any(span.overlaps(other) for span in mine.values() for other in theirs.values()):
                    raise Fault(f"{work.name} races with {waiting.name} on another stream")

    # Devices and contexts

    def cuGetErrorString(self, error: Any) -> tuple[Any, bytes]:
        return SUCCESS, str(error.name).encode()

    def cuDeviceGetCount(self) -> tuple[Any, int]:
        return SUCCESS, 1

    def cuDeviceGet(self, index: int) -> tuple[Any, int]:
        return SUCCESS, index

    def cuDeviceGetName(self, length: int, _device: int) -> tuple[Any, bytes]:
        """The bindings fill what the driver leaves with spaces."""
        return SUCCESS, b"a stand-in on host memory\0".ljust(length)

    def cuDeviceGetAttribute(self, attribute: Any, _device: int) -> tuple[Any, int]:
        return SUCCESS, 8 if "MAJOR" in attribute.name else 9

    def cuDriverGetVersion(self) -> tuple[Any, int]:
        return SUCCESS, 13000

    def cuDevicePrimaryCtxRetain(self, device: int) -> tuple[Any, int]:
        return SUCCESS, 1000 + device

    def cuCtxSetCurrent(self, context: int) -> tuple[Any]:
        self._thread.context = context
        return (SUCCESS,)

    # Memory

    def cuMemAlloc(self, nbytes: int) -> tuple[Any, int]:
        self.need_context("allocate")
        self.forbid_in_capture("allocate")
        if nbytes > self.cuMemGetInfo()[1]:
            return OUT_OF_MEMORY, 0
        memory = np.full(nbytes + ALIGNMENT, POISON, np.uint8)
        offset = -memory.ctypes.data % ALIGNMENT
        block = Block(
            memory.ctypes.data + offset, memory[offset : offset + nbytes], np.zeros(nbytes, bool)
        )
        self.blocks.append(block)
        self.calls.append(("allocate", nbytes))
        return SUCCESS, block.start

    def cuMemFree(self, pointer: int) -> tuple[Any]:
        """The memory is kept, so that whoever still writes to it harms nobody, and poisoned."""
        self.forbid_in_capture("free memory")
        block = next(block for block in self.blocks if block.start == pointer and not block.freed)
        block.freed = True
        block.raw[:] = POISON
        block.written[:] = False
        return (SUCCESS,)

    def cuMemGetInfo(self) -> tuple[Any, int, int]:
        free = self.capacity - sum(len(block.raw) for block in list(self.blocks) if not block.freed)
        return SUCCESS, free, self.capacity

    def cuMemHostAlloc(self, nbytes: int, _flags: int) -> tuple[Any, int]:
        self.forbid_in_capture("allocate host memory")
        memory = np.zeros(nbytes, np.uint8)
        self._pinned[memory.ctypes.data] = memory
        return SUCCESS, memory.ctypes.data

    def cuMemFreeHost(self, pointer: int) -> tuple[Any]:
        del self._pinned[pointer]
        return (SUCCESS,)

    def _pinned_at(self, pointer: int, nbytes: int) -> np.ndarray:
        for start, memory in self._pinned.items():
            if start <= pointer and pointer + nbytes <= start + len(memory):
                return memory[pointer - start : pointer - start + nbytes]
        raise Fault("a copy uses host memory that is not pinned")

    def cuMemcpyHtoDAsync(self, target: int, source: int, nbytes: int, stream: Any) -> tuple[Any]:
        """The host's memory is read when the copy is done, not when it is asked for."""
        self.forbid_in_capture("upload")
        host, span = self._pinned_at(source, nbytes), Span(target, nbytes)

        def run() -> None:
            self.bytes_at(span, "an upload")[:] = host

        self.stream_of(stream).put(Work("upload", {}, {"target": span}, run))
        return (SUCCESS,)

    def cuMemcpyDtoHAsync(self, target: int, source: int, nbytes: int, stream: Any) -> tuple[Any]:
        self.forbid_in_capture("download")
        host, span = self._pinned_at(target, nbytes), Span(source, nbytes)

        def run() -> None:
            host[:] = self.bytes_at(span, "a download")

        self.stream_of(stream).put(Work("download", {"source": span}, {}, run))
        self.calls.append(("download", nbytes))
        return (SUCCESS,)

    def cuMemcpyDtoDAsync(self, target: int, source: int, nbytes: int, stream: Any) -> tuple[Any]:
        read, written = Span(source, nbytes), Span(target, nbytes)

        def run() -> None:
            self.bytes_at(written, "a copy")[:] = self.bytes_at(read, "a copy")

        self.stream_of(stream).put(Work("copy", {"source": read}, {"target": written}, run))
        return (SUCCESS,)

    # Streams and events

    def cuStreamCreate(self, flags: int) -> tuple[Any, SimulatedStream]:
        self.need_context("make a stream")
        self.forbid_in_capture("make a stream")
        assert flags == real.CUstream_flags.CU_STREAM_NON_BLOCKING
        stream = SimulatedStream(self, next(self._handles))
        self.streams[stream.handle] = stream
        return SUCCESS, stream

    def cuStreamDestroy(self, stream: SimulatedStream) -> tuple[Any]:
        self.forbid_in_capture("destroy a stream")
        del self.streams[stream.handle]
        return (SUCCESS,)

    def cuStreamSynchronize(self, stream: Any) -> tuple[Any]:
        self.forbid_in_capture("wait")
        self.stream_of(stream).wait()
        return (SUCCESS,)

    def cuEventCreate(self, _flags: int) -> tuple[Any, list[float]]:
        self.forbid_in_capture("make an event")
        self.calls.append(("event", 0))
        return SUCCESS, [0.0]

    def cuEventDestroy(self, _event: list[float]) -> tuple[Any]:
        return (SUCCESS,)

    def cuEventRecord(self, event: list[float], stream: Any) -> tuple[Any]:
        self.forbid_in_capture("record an event for timing")

        def run() -> None:
            event[0] = time.perf_counter()

        self.stream_of(stream).put(Work("mark", {}, {}, run))
        return (SUCCESS,)

    def cuEventElapsedTime(self, first: list[float], last: list[float]) -> tuple[Any, float]:
        return SUCCESS, 1e3 * (last[0] - first[0])

    # Graphs

    def cuStreamBeginCapture(self, stream: Any, mode: Any) -> tuple[Any]:
        assert mode == real.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        if self._capturing:
            raise Fault("two captures at once")
        simulated = self.stream_of(stream)
        self._capturing[threading.get_ident()] = simulated
        simulated.graph = []
        return (SUCCESS,)

    def cuStreamEndCapture(self, stream: Any) -> tuple[Any, list[Work]]:
        simulated = self.stream_of(stream)
        del self._capturing[threading.get_ident()]
        graph, simulated.graph = simulated.graph, None
        assert graph is not None
        return SUCCESS, graph

    def cuGraphGetNodes(self, graph: list[Work], _count: int = 0) -> tuple[Any, list[Any], int]:
        return SUCCESS, [], len(graph)

    def cuGraphInstantiate(self, graph: list[Work], _flags: int) -> tuple[Any, list[Work] | None]:
        if not graph:
            raise Fault("an empty graph was captured")
        if self.refusal != SUCCESS:
            return self.refusal, None
        self.calls.append(("capture", len(graph)))
        return SUCCESS, list(graph)

    def cuGraphDestroy(self, _graph: list[Work]) -> tuple[Any]:
        return (SUCCESS,)

    def cuGraphExecDestroy(self, graph: list[Work]) -> tuple[Any]:
        if self._capturing:
            raise Fault("a graph is destroyed while a thread captures")
        graph.clear()
        return (SUCCESS,)

    def cuGraphLaunch(self, graph: list[Work], stream: Any) -> tuple[Any]:
        self.calls.append(("replay", len(graph)))
        simulated = self.stream_of(stream)
        for work in graph:
            simulated.put(Work(work.name, work.reads, work.writes, work.run, work.really_reads))
        return (SUCCESS,)

    # Kernels

    def cuModuleLoadData(self, image: bytes) -> tuple[Any, bytes]:
        self.need_context("load a module")
        return SUCCESS, image

    def cuModuleGetFunction(self, _module: bytes, name: bytes) -> tuple[Any, str]:
        return SUCCESS, name.decode()

    def cuLaunchKernel(self, function: str, blocks: int, *rest: Any) -> tuple[Any]:
        (_, _, threads, _, _, shared, stream, parameters, _) = rest
        assert shared == 0
        pointer = ctypes.cast(parameters, ctypes.POINTER(ctypes.c_void_p))[0]
        kernel: Kernel = kernel_of(function, blocks * threads, pointer or 0)
        self.stream_of(stream).put(
            Work(function, kernel.may_read, kernel.writes, kernel.run, kernel.reads)
        )
        return (SUCCESS,)
