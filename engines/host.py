"""The host as a device: memory that NumPy owns, and a stream whose calls are done on return."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from goc_deploy.errors import ResourceError
from goc_deploy.host_memory import available_bytes, host_array
from goc_deploy.precision import tensor_bytes
from goc_deploy.protocols import (
    ALIGNMENT,
    Buffer,
    Move,
    Run,
    Stream,
    float32_from_bfloat16,
    stored_values,
)


class HostStream:
    """See `goc_deploy.protocols.Stream`."""

    handle = 0

    def __init__(self) -> None:
        self._marks: list[float] = []
        self._lock = threading.RLock()

    def held(self) -> AbstractContextManager[Any]:
        """See `goc_deploy.protocols.Stream.held`."""
        return self._lock

    def upload(self, values: np.ndarray, target: Buffer) -> None:
        """Copy host values into a buffer."""
        host_array(target)[...] = (
            stored_values(values, target.dtype) if target.dtype == "bfloat16" else values
        )

    def download(self, source: Buffer) -> np.ndarray:
        """Copy a buffer."""
        values = host_array(source).copy()
        return float32_from_bfloat16(values) if source.dtype == "bfloat16" else values

    def copy(self, source: Buffer, target: Buffer) -> None:
        """Copy a buffer to another."""
        host_array(target)[...] = host_array(source)

    def wait(self) -> None:
        """Return at once; there is nothing to wait for."""

    def recorded(self, launches: Sequence[Run]) -> Sequence[Run]:
        """Return the launches themselves."""
        return launches

    def interrupt(self) -> None:
        """Do nothing: without a library, nothing that runs can be stopped."""

    def resume(self, *, interruptible: bool) -> None:
        """Do nothing."""

    def mark(self, index: int) -> None:
        """Record the time."""
        del self._marks[index:]
        self._marks.append(time.perf_counter())

    def marked_ms(self, count: int) -> list[float]:
        """Return the milliseconds from the first mark to each."""
        return [1e3 * (mark - self._marks[0]) for mark in self._marks[:count]]


class HostDevice:
    """See `goc_deploy.protocols.Device`."""

    kind = "cpu"
    shares_launches = False

    def step_start(self, moves: Sequence[Move], step: Buffer, stream: Stream) -> Run:
        """Fail: steps do not share launches on the host."""
        raise AssertionError((moves, step, stream))

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        """Allocate memory. The system provides pages when they are first written.

        Raises:
            ResourceError: the system has not enough memory.
        """
        nbytes = tensor_bytes(dtype, shape)
        try:
            memory = np.empty(nbytes + ALIGNMENT, np.uint8)
        except MemoryError as cause:
            raise ResourceError(
                f"{nbytes / 1e9:.2f} GB for buffers cannot be allocated; use a smaller batch size"
            ) from cause
        offset = -memory.ctypes.data % ALIGNMENT
        return Buffer(memory.ctypes.data + offset, tuple(shape), dtype, memory)

    def stream(self) -> HostStream:
        """Create a stream without a queue."""
        return HostStream()

    def free_bytes(self) -> int | None:
        """Return the memory that can be used without swapping."""
        return available_bytes()

    def describe(self) -> dict[str, Any]:
        """Return nothing: the host needs no description."""
        return {}
