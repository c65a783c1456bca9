"""Memory of the host: how much is available, returning it, and buffers in it as arrays."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Iterable

import numpy as np

from goc_deploy.precision import ELEMENT_TYPES
from goc_deploy.protocols import NUMPY_DTYPES, Buffer


def available_bytes() -> int | None:
    """Return the memory that can be used without swapping, or None if the system has no answer."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def return_free_pages(contents: Iterable[memoryview]) -> None:
    """Return to the system the pages of mapped files and the memory that the allocator keeps.

    Loading frees a copy of every weight. On DiT-XL/2 in float32 this lowers the resident memory
    from 6.9 to 2.8 GB.
    """
    for content in contents:
        if isinstance(content.obj, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            content.obj.madvise(mmap.MADV_DONTNEED)
    with contextlib.suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)


def host_array(buffer: Buffer) -> np.ndarray:
    """View a buffer in host memory as a NumPy array; elements of 4 bits as a row of bytes."""
    start = buffer.pointer - buffer.owner.ctypes.data
    flat: np.ndarray = buffer.owner[start : start + buffer.nbytes].view(NUMPY_DTYPES[buffer.dtype])
    return flat if ELEMENT_TYPES[buffer.dtype].bits < 8 else flat.reshape(buffer.shape)
