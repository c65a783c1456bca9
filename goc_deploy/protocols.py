"""The interfaces between stages: all that one stage may know of another one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np

from goc_deploy.precision import DTYPE_BYTES, ELEMENT_TYPES, tensor_bytes

NOTHING: Mapping[str, Any] = MappingProxyType({})
NUMPY_DTYPES = {dtype: np.dtype(kind.numpy) for dtype, kind in ELEMENT_TYPES.items()}
ALIGNMENT = 256  # of every address that an engine is bound to, as TensorRT requires

Run = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Buffer:
    """Device memory with a shape. Two buffers may be views of the same memory.

    Attributes:
        pointer: address of the first element.
        shape: dimensions.
        dtype: a key of ``ELEMENT_TYPES``.
        owner: keeps the memory alive.
    """

    pointer: int
    shape: tuple[int, ...]
    dtype: str
    owner: Any

    @property
    def nbytes(self) -> int:
        """Size of the view in bytes."""
        return tensor_bytes(self.dtype, self.shape)

    def overlaps(self, other: Buffer) -> bool:
        """Return whether two buffers share memory."""
        return (
            self.pointer < other.pointer + other.nbytes
            and other.pointer < self.pointer + self.nbytes
        )

    def view(self, *shape: int, start: int = 0) -> Buffer:
        """View this memory in another shape, from element ``start`` on."""
        offset = start * DTYPE_BYTES[self.dtype]
        assert offset + math.prod(shape) * DTYPE_BYTES[self.dtype] <= self.nbytes, (
            self.shape,
            shape,
            start,
        )
        return replace(self, pointer=self.pointer + offset, shape=shape)


@dataclass(frozen=True, slots=True)
class Move:
    """A copy at the start of a step: ``target[m, b] = source[k % period][m, rows[b]]`` at step k.

    It brings the values of the step to the addresses that its launches read.

    Attributes:
        source: (M, R, W), the values of step 0.
        target: (M, B, W).
        period: number of different sources.
        stride: elements from the source of one step to that of the next.
        rows: (B,) int64; with None, R = B and row b is copied to row b.
    """

    source: Buffer
    target: Buffer
    period: int = 1
    stride: int = 0
    rows: Buffer | None = None


def float32_from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """Widen bfloat16 values exactly; they are uint16, because NumPy has no such dtype."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def bfloat16_from_float32(values: np.ndarray) -> np.ndarray:
    """Round values to the nearest bfloat16, as uint16."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def stored_values(values: np.ndarray, dtype: str) -> np.ndarray:
    """Convert values to a dtype, contiguous; an array of uint16 holds bfloat16 values already."""
    if dtype == "bfloat16" and values.dtype != np.uint16:
        return bfloat16_from_float32(values)
    return np.ascontiguousarray(values, NUMPY_DTYPES[dtype])


def mapped_buffer(content: memoryview, offset: int, shape: tuple[int, ...], dtype: str) -> Buffer:
    """View a tensor inside read-only memory, such as a mapped file, without copying it."""
    owner = np.frombuffer(content, np.uint8)
    return Buffer(owner.ctypes.data + offset, shape, dtype, owner)


class Stream(Protocol):
    """The queue of a session, whose operations run in the order in which they are put on it.

    Only the thread that holds a stream may use it.
    """

    @property
    def handle(self) -> int:
        """The device's stream, or 0 on the host."""
        ...

    def held(self) -> AbstractContextManager[Any]:
        """Hold the stream for this thread until the block ends; other threads wait.

        A thread that holds the stream already may hold it again.
        """
        ...

    def upload(self, values: np.ndarray, target: Buffer) -> None:
        """Copy host values into a buffer of the same size; they may change after the call."""
        ...

    def download(self, source: Buffer) -> np.ndarray:
        """Wait for the stream, then copy a buffer to the host (float32 for ``bfloat16``)."""
        ...

    def copy(self, source: Buffer, target: Buffer) -> None:
        """Copy a buffer to another of the same size on the device."""
        ...

    def wait(self) -> None:
        """Return after everything that was put on the stream is done."""
        ...

    def recorded(self, launches: Sequence[Run]) -> Sequence[Run]:
        """Return what to call in place of launches that ran before.

        That is one replay if the device has graphs, and the launches themselves otherwise.
        """
        ...

    def interrupt(self) -> None:
        """Make running and later launches fail soon, if the library can; any thread may call this.

        Otherwise nothing happens, and launches end normally.
        """
        ...

    def resume(self, *, interruptible: bool) -> None:
        """Let launches run again after `interrupt`.

        Args:
            interruptible: whether `interrupt` has an effect from now on, which makes launches
                slower (ONNX Runtime on the CPU: by 30 microseconds).
        """
        ...

    def mark(self, index: int) -> None:
        """Record the time when everything that was put on the stream so far is done."""
        ...

    def marked_ms(self, count: int) -> list[float]:
        """Wait for the stream, then return the time from the first mark to each of ``count``."""
        ...


class Device(Protocol):
    """Memory and streams: all that sessions and backends know of the hardware."""

    @property
    def kind(self) -> str:
        """``cpu`` or ``cuda``."""
        ...

    @property
    def shares_launches(self) -> bool:
        """Whether all steps of one kind should be the same launches at the same addresses.

        If so, the launches are recorded once, and `step_start` copies what a step needs to their
        addresses. Otherwise each step reads its values in place.
        """
        ...

    def step_start(self, moves: Sequence[Move], step: Buffer, stream: Stream) -> Run:
        """Return the launch that begins each step of a device that shares launches.

        The launch adds one to ``step``, then copies.

        Args:
            moves: the copies, in order. A move without ``rows`` and with a period of 1 may read
                what an earlier move of the same size has overwritten.
            step: (1,) int32, the number of the step that ran last; -1 before the first.
            stream: the stream to launch on.

        Raises:
            EnvironmentUnsupportedError: the kernels for it cannot be compiled.
        """
        ...

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        """Allocate memory, aligned to ``ALIGNMENT``, not initialised.

        Raises:
            ResourceError: the device has not enough memory.
        """
        ...

    def stream(self) -> Stream:
        """Create a stream."""
        ...

    def free_bytes(self) -> int | None:
        """Return how much memory can be allocated, or None if the system does not report it."""
        ...

    def describe(self) -> dict[str, Any]:
        """Describe the device for reports."""
        ...


class Engine(Protocol):
    """A graph that a backend has made executable."""

    @property
    def dtypes(self) -> Mapping[str, str]:
        """The dtype of each input and output by name, a key of ``DTYPE_BYTES``."""
        ...

    def bind(
        self,
        inputs: Mapping[str, Buffer],
        outputs: Mapping[str, Buffer],
        stream: Stream | None = None,
    ) -> Run:
        """Bind tensors by address; the returned function puts a run of the graph on the stream.

        Outputs without a buffer are discarded. An output may share the memory of an input that the
        graph reads element by element before it writes, such as the oldest history entry.

        Args:
            inputs: buffers by name.
            outputs: buffers by name.
            stream: the session's stream; None is the backend's own.

        Raises:
            EngineDirError: the graph has no tensor of a name, or a dtype or size is wrong.
        """
        ...


@dataclass(frozen=True, slots=True)
class Footprint:
    """Device memory that a backend takes in addition to the buffers of its sessions.

    Attributes:
        weights: bytes that all sessions share.
        scratch: bytes of each session.
    """

    weights: int = 0
    scratch: int = 0


def taken(engine: Engine, offered: Mapping[str, Buffer]) -> dict[str, Buffer]:
    """Select those of the offered inputs that a graph has."""
    return {name: buffer for name, buffer in offered.items() if name in engine.dtypes}


class Backend(Protocol):
    """A library with a kind of device: it loads graphs and makes engines of them.

    Attributes:
        name: its name on the command line.
        device: the device that engines run on.
        stacks: True if the backend prefers few, large launches (GPUs): a collapsed step is one
            launch, and with segments a full step too. False (CPU): every unit is a launch, and a
            collapsed step's predictions are made during the preceding step, while their inputs are
            in cache.
        passed_over: faster backends that were tried first -> why they do not work here.
    """

    name: str
    device: Device
    stacks: bool
    passed_over: Mapping[str, str]

    def stream(self) -> Stream:
        """Return the stream of a session: a new one, unless the backend has one for all."""
        ...

    def predict_engine(self, signature: str, dtype: str) -> Engine | None:
        """Return an engine that predicts without a graph, or None if the graph must be loaded.

        Args:
            signature: see `goc_deploy.compiler.plan.Predict.signature`.
            dtype: dtype of the model's tensors.
        """
        ...

    def footprint(self, graphs: Mapping[str, Mapping[str, int]]) -> Footprint:
        """Estimate the device memory of graphs from the engine directory, before they are loaded.

        Args:
            graphs: SHA-256 of each ONNX file -> path and size of every weights file of the graph.
        """
        ...

    def load(
        self,
        onnx: memoryview,
        initializers: Mapping[str, Buffer],
        inputs: Mapping[str, Buffer] = NOTHING,
        *,
        runs_once: bool = False,
    ) -> Engine:
        """Load a graph.

        Args:
            onnx: the ONNX file.
            initializers: values of its external initializers, on the host, read during the call.
            inputs: inputs that are the same on every run, on the host. Their memory must outlive
                the engine.
            runs_once: the graph runs only once, so the load should not spend time on making it
                faster.
        """
        ...

    def check_replaceable(self, engine: Engine, weights: Set[str]) -> None:
        """Check that the weights of an engine can be replaced, before anything is done.

        Args:
            engine: an engine of this backend.
            weights: names of its initializers and inputs.

        Raises:
            EnvironmentUnsupportedError: the engine was built with embedded weights.
        """
        ...

    def replace_weights(
        self, engine: Engine, initializers: Mapping[str, Buffer], inputs: Mapping[str, Buffer]
    ) -> bool:
        """Overwrite the weights that an engine reads at an address; its launches stay valid.

        Args:
            engine: an engine that is not running.
            initializers: as for `load`, of the same names, shapes and dtypes. Their memory must
                outlive the engine.
            inputs: the same for inputs.

        Returns:
            True if the weights were replaced; if False, the graph must be loaded again.
        """
        ...

    def keep_compiled(self) -> None:
        """Save what was compiled for a batch shape, after its first run, for the next process."""
        ...

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        """See `Device.allocate`."""
        ...

    def upload(self, values: np.ndarray, target: Buffer) -> None:
        """Copy host values into a buffer of the same size, before any stream reads it."""
        ...

    def download(self, source: Buffer) -> np.ndarray:
        """Copy a buffer to the host (float32 for ``bfloat16``)."""
        ...

    def describe(self) -> dict[str, Any]:
        """Describe the backend for reports: name, version, device, threads, `passed_over`."""
        ...
