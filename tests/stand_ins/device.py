"""A GPU of host memory that holds programs to the rules of CUDA.

Work is queued and done only when somebody waits, so a forgotten wait reads old bytes. Every byte knows whether it was
written; fresh and freed memory is 0xFF, which is NaN in every float type. Addresses outside of live allocations, reads of
bytes that nobody wrote, streams that race, and calls that a capture forbids raise `Fault`.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from goc_deploy.errors import ResourceError
from goc_deploy.protocols import (
    ALIGNMENT,
    DTYPE_BYTES,
    NUMPY_DTYPES,
    Buffer,
    Launch,
    float32_from_bfloat16,
    stored_values,
)

POISON = 0xFF


class Fault(AssertionError):
    """Something that a GPU would not forgive."""


class Owner:
    """Keeps an allocation alive."""


@dataclass(eq=False)
class Block:
    """An allocation."""

    start: int
    raw: np.ndarray
    written: np.ndarray
    freed: bool = False


@dataclass(frozen=True)
class Span:
    """Bytes at an address."""

    start: int
    nbytes: int

    @property
    def end(self) -> int:
        return self.start + self.nbytes

    def overlaps(self, other: Span) -> bool:
        return self.start < other.end and other.start < self.end


@dataclass(frozen=True)
class Work:
    """Something on a stream: what it is, the bytes it reads and writes by name, and what it does."""

    name: str
    reads: dict[str, Span]
    writes: dict[str, Span]
    run: Callable[[], None]
    thread: int = field(default_factory=threading.get_ident)


@dataclass(eq=False)
class StandInDevice:
    """See `goc_deploy.protocols.Device`. ``calls`` records what was done with it.

    ``sees_writes`` is off where somebody writes to the memory without a stream, as ONNX Runtime's CPU provider does.
    """

    capacity: int = 2**31
    graphs: bool = True
    kind: str = "cuda"
    sees_writes: bool = True
    calls: list[tuple[Any, ...]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.blocks: list[Block] = []
        self.streams: dict[int, weakref.ref[StandInStream]] = {}
        self._capturing: dict[int, StandInStream] = {}  # thread -> stream
        self._next_handle = 1

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        self.forbid_in_capture("allocate")
        nbytes = int(np.prod(shape, dtype=np.int64)) * DTYPE_BYTES[dtype]
        free = self.free_bytes()
        if nbytes > free:
            raise ResourceError(f"{nbytes} bytes do not fit into {free}")
        memory = np.full(nbytes + ALIGNMENT, POISON, np.uint8)
        offset = -memory.ctypes.data % ALIGNMENT
        block = Block(memory.ctypes.data + offset, memory[offset : offset + nbytes], np.zeros(nbytes, bool))
        self.blocks.append(block)
        owner = Owner()
        weakref.finalize(owner, self._free, block)
        self.calls.append(("allocate", nbytes))
        return Buffer(block.start, tuple(shape), dtype, owner)

    @staticmethod
    def _free(block: Block) -> None:
        """The memory is kept, so that whoever still writes to it harms nobody, and poisoned."""
        block.freed = True
        block.raw[:] = POISON
        block.written[:] = False

    def stream(self) -> StandInStream:
        self.forbid_in_capture("make a stream")
        stream = StandInStream(self, self._next_handle)
        self.streams[self._next_handle] = weakref.ref(stream)
        self._next_handle += 1
        return stream

    def free_bytes(self) -> int:
        return self.capacity - sum(len(block.raw) for block in self.blocks if not block.freed)

    def describe(self) -> dict[str, Any]:
        return {"device": "a stand-in on host memory", "cuda_graphs": self.graphs}

    def stream_of(self, handle: int) -> StandInStream:
        stream = self.streams[handle]() if handle in self.streams else None
        if stream is None:
            raise Fault(f"there is no stream {handle}")
        return stream

    def forbid_in_capture(self, what: str) -> None:
        if threading.get_ident() in self._capturing:
            raise Fault(f"{what}: illegal while a stream is captured")

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
        for name, span in work.reads.items():
            block, place = self.block_of(span, f"{work.name}: {name}")
            if self.sees_writes and not block.written[place].all():
                raise Fault(f"{work.name} reads {name}, which nobody wrote")
        work.run()
        for name, span in work.writes.items():
            block, place = self.block_of(span, f"{work.name}: {name}")
            block.written[place] = True

    def check_race(self, stream: StandInStream, work: Work) -> None:
        others = (other for ref in self.streams.values() if (other := ref()) is not None and other is not stream)
        for waiting in (waiting for other in others for waiting in list(other.pending)):
            for mine, theirs in (
                (work.writes, {**waiting.reads, **waiting.writes}),
                (work.reads, waiting.writes),
            ):
                if any(span.overlaps(other) for span in mine.values() for other in theirs.values()):
                    raise Fault(f"{work.name} races with {waiting.name} on another stream")


class StandInStream:
    """See `goc_deploy.protocols.Stream`."""

    def __init__(self, device: StandInDevice, handle: int) -> None:
        self.device, self.handle = device, handle
        self.pending: list[Work] = []
        self.graph: list[Work] | None = None
        self._marks: list[float] = []
        self._lock, self._holder = threading.RLock(), 0

    @contextmanager
    def held(self) -> Iterator[None]:
        with self._lock:
            before, self._holder = self._holder, threading.get_ident()
            try:
                yield
            finally:
                self._holder = before

    def put(self, work: Work) -> None:
        if self._holder != threading.get_ident() and any(w.thread != threading.get_ident() for w in self.pending):
            raise Fault(f"{work.name}: put on a stream that another thread uses; hold it first")
        if self.graph is not None:
            self.graph.append(work)
            return
        self.device.check_race(self, work)
        self.pending.append(work)

    def wait(self) -> None:
        self.device.forbid_in_capture("wait")
        while self.pending:
            self.device.perform(self.pending[0])
            self.pending.pop(0)

    def upload(self, values: np.ndarray, target: Buffer) -> None:
        self.device.forbid_in_capture("upload from pageable memory")
        stored = stored_values(values, target.dtype).copy()
        assert stored.nbytes == target.nbytes
        span = Span(target.pointer, target.nbytes)

        def run() -> None:
            self.device.bytes_at(span, "an upload")[:] = stored.reshape(-1).view(np.uint8)

        self.put(Work("upload", {}, {"target": span}, run))

    def copy(self, source: Buffer, target: Buffer) -> None:
        read, written = Span(source.pointer, source.nbytes), Span(target.pointer, target.nbytes)

        def run() -> None:
            self.device.bytes_at(written, "a copy")[:] = self.device.bytes_at(read, "a copy")

        self.put(Work("copy", {"source": read}, {"target": written}, run))

    def download(self, source: Buffer) -> np.ndarray:
        self.device.forbid_in_capture("download")
        found: list[np.ndarray] = []
        span = Span(source.pointer, source.nbytes)
        self.put(
            Work(
                "download", {"source": span}, {}, lambda: found.append(self.device.bytes_at(span, "a download").copy())
            )
        )
        self.wait()
        self.device.calls.append(("download", source.nbytes))
        values = found[0].view(NUMPY_DTYPES[source.dtype]).reshape(source.shape)
        return float32_from_bfloat16(values) if source.dtype == "bfloat16" else values

    def recorded(self, launches: Sequence[Launch]) -> Sequence[Launch]:
        if not self.device.graphs:
            return launches
        self.device.forbid_in_capture("capture")
        self.wait()
        thread = threading.get_ident()
        self.device._capturing[thread], self.graph = self, []
        try:
            for launch in launches:
                launch()
        finally:
            del self.device._capturing[thread]
            graph, self.graph = self.graph, None
        if not graph:
            raise Fault("an empty graph was captured")
        self.device.calls.append(("capture", len(graph)))

        def replay() -> None:
            self.device.calls.append(("replay", len(graph)))
            for work in graph:
                self.put(work)

        return (replay,)

    def mark(self, index: int) -> None:
        self.device.forbid_in_capture("record an event for timing")
        del self._marks[index:]
        self.put(Work("mark", {}, {}, lambda: self._marks.append(time.perf_counter())))

    def marked_ms(self, count: int) -> list[float]:
        self.wait()
        return [1e3 * (mark - self._marks[0]) for mark in self._marks[:count]]
