"""What the runtime asks of a backend. Everything a stage may know of another one stands here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np

NOTHING: Mapping[str, Any] = MappingProxyType({})
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8}
DTYPE_OF_PRECISION = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


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

    def view(self, *shape: int, start: int = 0) -> Buffer:
        """Elements ``start ...`` of this memory with another shape."""
        offset = start * DTYPE_BYTES[self.dtype]
        assert offset + math.prod(shape) * DTYPE_BYTES[self.dtype] <= self.nbytes, (self.shape, shape, start)
        return replace(self, pointer=self.pointer + offset, shape=shape)


def float32_from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """bfloat16 values, given as uint16 because NumPy has no such dtype, widened exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def mapped_buffer(content: memoryview, offset: int, shape: tuple[int, ...], dtype: str) -> Buffer:
    """A tensor inside read-only memory, such as a mapped file, without copying it."""
    owner = np.frombuffer(content, np.uint8)
    return Buffer(owner.ctypes.data + offset, shape, dtype, owner)


class Engine(Protocol):
    """A loaded graph.

    Attributes:
        dtypes: input or output name -> a key of ``DTYPE_BYTES``.
    """

    @property
    def dtypes(self) -> Mapping[str, str]: ...

    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> Callable[[], None]:
        """Bind tensors by address; the returned function runs the graph on them.

        Outputs that are not named are not computed. An output may lie on an input that the graph reads element by
        element before it writes (the entry of the history that dies).

        Raises:
            EngineDirError: a name the graph does not have, or a dtype or size it does not take.
        """
        ...


def taken(engine: Engine, offered: Mapping[str, Buffer]) -> dict[str, Buffer]:
    """Those of the offered inputs that a graph takes."""
    return {name: buffer for name, buffer in offered.items() if name in engine.dtypes}


class Backend(Protocol):
    """Loads graphs and owns device memory."""

    name: str

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
            initializers: values of its external initializers, read during the call.
            inputs: inputs that are the same on every run, read where they lie on every run.
            runs_once: time spent at load to make the graph faster would be lost.
        """
        ...

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        """New memory, 256-byte aligned, not initialised."""
        ...

    def upload(self, values: np.ndarray, target: Buffer) -> None:
        """Copy host values into a buffer of the same size."""
        ...

    def download(self, source: Buffer) -> np.ndarray:
        """A copy of a buffer on the host (float32 for ``bfloat16``)."""
        ...

    def describe(self) -> dict[str, Any]:
        """Name, version, device, threads, and what fell back, for reports."""
        ...
