"""What the runtime asks of a backend. Everything a stage may know of another one stands here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np

from goc_deploy.precision import DTYPE_BYTES, ELEMENT_TYPES

NOTHING: Mapping[str, Any] = MappingProxyType({})
NUMPY_DTYPES = {dtype: np.dtype(kind.numpy) for dtype, kind in ELEMENT_TYPES.items()}
ALIGNMENT = 256  # of every address that an engine is given: what TensorRT asks for

Launch = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Buffer:
    """Device memory with a shape. Two buffers may be views of the same memory.

    Attributes:
        pointer: address of the first element.
        shape: dimensions.
        dtype: a key of ``DTYPE_BYTES``.
        owner: keeps the memory alive.
    """

    pointer: int
    shape: tuple[int, ...]
    dtype: str
    owner: Any

    @property
    def nbytes(self) -> int:
        """Bytes of the view."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]

    def overlaps(self, other: Buffer) -> bool:
        """Whether two buffers share memory."""
        return (
            self.pointer < other.pointer + other.nbytes
            and other.pointer < self.pointer + self.nbytes
        )

    def view(self, *shape: int, start: int = 0) -> Buffer:
        """Elements ``start ...`` of this memory with another shape."""
        offset = start * DTYPE_BYTES[self.dtype]
        assert offset + math.prod(shape) * DTYPE_BYTES[self.dtype] <= self.nbytes, (
            self.shape,
            shape,
            start,
        )
        return replace(self, pointer=self.pointer + offset, shape=shape)


@dataclass(frozen=True, slots=True)
class Move:
    """What a step moves to where its launches find it: ``target[m, b] = source[k % period][m, rows[b]]`` at step k.

    Attributes:
        source: (M, R, W), what step 0 takes.
        target: (M, B, W).
        period: number of different sources.
        stride: elements from the source of a step to that of the next.
        rows: (B,) int64; None is row b of R = B.
    """

    source: Buffer
    target: Buffer
    period: int = 1
    stride: int = 0
    rows: Buffer | None = None


def float32_from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """bfloat16 values, given as uint16 because NumPy has no such dtype, widened exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def bfloat16_from_float32(values: np.ndarray) -> np.ndarray:
    """Values rounded to the nearest bfloat16, as uint16."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def stored_values(values: np.ndarray, dtype: str) -> np.ndarray:
    """Values as memory of a dtype holds them, contiguous; what is uint16 already is taken as bfloat16."""
    if dtype == "bfloat16" and values.dtype != np.uint16:
        return bfloat16_from_float32(values)
    return np.ascontiguousarray(values, NUMPY_DTYPES[dtype])


def mapped_buffer(content: memoryview, offset: int, shape: tuple[int, ...], dtype: str) -> Buffer:
    """A tensor inside read-only memory, such as a mapped file, without copying it."""
    owner = np.frombuffer(content, np.uint8)
    return Buffer(owner.ctypes.data + offset, shape, dtype, owner)


class Stream(Protocol):
    """What a session runs on: what is put on a stream happens in order. For the thread that holds it.

    Attributes:
        handle: of the device's stream, 0 on the host.
    """

    @property
    def handle(self) -> int: ...

    def held(self) -> AbstractContextManager[Any]:
        """Take the stream for this thread, which may hold it already; other threads wait until the block ends."""
        ...

    def upload(self, values: np.ndarray, target: Buffer) -> None:
        """Copy host values, which may change afterwards, into a buffer of the same size."""
        ...

    def download(self, source: Buffer) -> np.ndarray:
        """Wait for the stream; a copy of a buffer on the host (float32 for ``bfloat16``)."""
        ...

    def copy(self, source: Buffer, target: Buffer) -> None:
        """Copy a buffer to another of the same size on the device."""
        ...

    def wait(self) -> None:
        """Return once everything that was put on the stream is done."""
        ...

    def recorded(self, launches: Sequence[Launch]) -> Sequence[Launch]:
        """What to call in place of launches that ran before: one replay where the device has graphs, else themselves."""
        ...

    def mark(self, index: int) -> None:
        """Note when everything that was put on the stream so far is done."""
        ...

    def marked_ms(self, count: int) -> list[float]:
        """Wait for the stream; milliseconds from the first mark to each of the first ``count``."""
        ...


class Device(Protocol):
    """Memory and streams: all that sessions and backends know of the hardware.

    Attributes:
        kind: ``cpu`` or ``cuda``.
        shares_launches: whether steps of a kind had better be the same launches at the same addresses, so that they are
            recorded once, and `step_start` moves there what a step needs. Where it is not, each step reads where its
            values lie.
    """

    @property
    def kind(self) -> str: ...

    @property
    def shares_launches(self) -> bool: ...

    def step_start(self, moves: Sequence[Move], step: Buffer, stream: Stream) -> Launch:
        """What begins each step of a device that shares launches: it adds one to the step, then moves.

        Args:
            moves: done in order; a plain move may read what an earlier one of the same size has written over.
            step: (1,) int32, the step that ran last; -1 before the first.
            stream: where it is put.

        Raises:
            EnvironmentUnsupportedError: the kernels for it cannot be compiled.
        """
        ...

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        """New memory, aligned to ``ALIGNMENT``, not initialised.

        Raises:
            ResourceError: there is not that much.
        """
        ...

    def stream(self) -> Stream:
        """A new stream."""
        ...

    def free_bytes(self) -> int | None:
        """Memory that can be allocated, or None where the system does not say."""
        ...

    def describe(self) -> dict[str, Any]:
        """Which device, for reports."""
        ...


class Engine(Protocol):
    """A loaded graph.

    Attributes:
        dtypes: input or output name -> a key of ``DTYPE_BYTES``.
    """

    @property
    def dtypes(self) -> Mapping[str, str]: ...

    def bind(
        self,
        inputs: Mapping[str, Buffer],
        outputs: Mapping[str, Buffer],
        stream: Stream | None = None,
    ) -> Launch:
        """Bind tensors by address; the returned function puts a run of the graph on the stream.

        Outputs that are not named are not kept. An output may lie on an input that the graph reads element by
        element before it writes (the entry of the history that dies).

        Args:
            inputs, outputs: by name.
            stream: of the session; None is the backend's own.

        Raises:
            EngineDirError: a name the graph does not have, or a dtype or size it does not take.
        """
        ...


@dataclass(frozen=True, slots=True)
class Footprint:
    """Device memory that a backend takes beside the buffers of its sessions.

    Attributes:
        weights: bytes that all sessions share.
        scratch: bytes of each session.
    """

    weights: int = 0
    scratch: int = 0


def taken(engine: Engine, offered: Mapping[str, Buffer]) -> dict[str, Buffer]:
    """Those of the offered inputs that a graph takes."""
    return {name: buffer for name, buffer in offered.items() if name in engine.dtypes}


class Backend(Protocol):
    """Loads graphs for a device.

    Attributes:
        name: as on the command line.
        device: where they run.
        stacks: True if the backend prefers few, large launches (GPUs): a collapsed step is one launch,
            and with segments a full step too. False (CPU): every unit is a launch, and a collapsed
            step's predictions are made during the preceding step, while their inputs are in cache.
        passed_over: faster backends that were tried first -> why they do not work here.
    """

    name: str
    device: Device
    stacks: bool
    passed_over: Mapping[str, str]

    def stream(self) -> Stream:
        """The stream of a session: one of its own, unless this backend has a single one for all."""
        ...

    def predictor(self, signature: str, dtype: str) -> Engine | None:
        """An engine for launches of a predict signature that needs no graph, or None where the graph is loaded.

        Args:
            signature: see `goc_deploy.compiler.plan.Predict.signature`.
            dtype: of the model's tensors.
        """
        ...

    def footprint(self, graphs: Mapping[str, Mapping[str, int]]) -> Footprint:
        """Device memory of graphs, as far as the engine directory tells before they are loaded.

        Args:
            graphs: SHA-256 of an ONNX file -> path and size of every file with weights of the graph.
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
            onnx: the graph.
            initializers: values of its external initializers, on the host, read during the call.
            inputs: inputs that are the same on every run, on the host; they must stay where they lie.
            runs_once: time spent at load to make the graph faster would be lost.
        """
        ...

    def check_replaceable(self, engine: Engine, weights: Set[str]) -> None:
        """Check that the weights of an engine can be exchanged, before anything is done.

        Args:
            engine: of this backend.
            weights: names of its initializers and inputs.

        Raises:
            EnvironmentUnsupportedError: the engine was built with its weights inside.
        """
        ...

    def replace_weights(
        self, engine: Engine, initializers: Mapping[str, Buffer], inputs: Mapping[str, Buffer]
    ) -> bool:
        """Overwrite the weights of an engine that reads them at an address; what is bound stays bound.

        Args:
            engine: on which nothing runs.
            initializers, inputs: as `load` takes them, of the same names, shapes and dtypes. They must stay where they lie.

        Returns:
            Whether it was done; otherwise the graph must be loaded again.
        """
        ...

    def keep_compiled(self) -> None:
        """Called after a batch shape ran for the first time: keep what was compiled for it for the next process."""
        ...

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        """See `Device.allocate`."""
        ...

    def upload(self, values: np.ndarray, target: Buffer) -> None:
        """Copy host values into a buffer of the same size, before any stream reads it."""
        ...

    def download(self, source: Buffer) -> np.ndarray:
        """A copy of a buffer on the host (float32 for ``bfloat16``)."""
        ...

    def describe(self) -> dict[str, Any]:
        """Name, version, device, threads, and what was passed over, for reports."""
        ...
