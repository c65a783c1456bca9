"""The kernel from Python: its parameters, its geometry, and the bytes that a launch moves."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from goc_deploy.compiler.cache_ops import updates_from_signature
from goc_deploy.compiler.plan import MAX_LAUNCH_UNITS
from goc_deploy.engines import driver
from goc_deploy.engines.plugin import nvrtc
from goc_deploy.errors import EngineDirError
from goc_deploy.precision import DTYPE_BYTES, DTYPE_OF_PRECISION
from goc_deploy.schedule import MAX_HISTORY

SOURCE_PATH = Path(__file__).parent / "update.cu"
MOVES_SOURCE_PATH = SOURCE_PATH.with_name("moves.cu")
ACCUMULATE_SOURCE_PATH = SOURCE_PATH.with_name("accumulate.cu")
MAX_UNITS, MAX_ENTRIES = MAX_LAUNCH_UNITS, MAX_HISTORY
TOKENS_PER_THREAD = (2, 1)
# On an H100 with 132 processors: 16 KB of reads in flight on each, for one entry per unit.
BUSY_BLOCKS = 4 * 132
THREADS = 128
VECTOR_BYTES = 16
DTYPES = tuple(DTYPE_OF_PRECISION.values())
KERNELS = (
    *(
        f"goc_stack_{dtype}_{access}"
        for dtype in DTYPES
        for access in (*TOKENS_PER_THREAD, "single")
    ),
    *(f"goc_accumulate_{dtype}_{access}" for dtype in DTYPES for access in ("vector", "single")),
    "goc_next_step",
    "goc_step_moves",
)


class StackParameters(ctypes.Structure):
    """``GocStack`` of ``update.cu``."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("x_out", ctypes.c_void_p),
        ("gates", ctypes.c_void_p),
        ("coefficients", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
        ("hidden", ctypes.c_int64),
        ("units", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("history", ctypes.c_void_p * MAX_ENTRIES * MAX_UNITS),
        ("stored", ctypes.c_void_p * MAX_UNITS),
        ("coefficient", ctypes.c_uint16 * MAX_UNITS),
        ("entries", ctypes.c_uint8 * (MAX_UNITS + 1)),
    )


@dataclass(frozen=True, slots=True)
class Stack:
    """The units of a launch.

    Attributes:
        entries: history entries that each unit reads, 1 to ``MAX_ENTRIES``.
        stores: whether each unit's prediction is written.
    """

    entries: tuple[int, ...]
    stores: tuple[bool, ...]

    def __post_init__(self) -> None:
        assert 0 < len(self.entries) == len(self.stores) <= MAX_UNITS
        assert all(1 <= count <= MAX_ENTRIES for count in self.entries)

    @property
    def units(self) -> int:
        """Number of units."""
        return len(self.entries)

    def bytes_needed(self, shape: Sequence[int], dtype: str) -> int:
        """Count the bytes that a launch must move: every tensor, gate and coefficient once.

        Args:
            shape: (B, T, D).
            dtype: of the tensors.
        """
        rows, tokens, hidden = shape
        features = (
            2 + sum(self.entries) + sum(self.stores)
        )  # x, x_out, histories, stored predictions
        gates = self.units * rows * hidden
        return (features * rows * tokens * hidden + gates) * DTYPE_BYTES[dtype] + 4 * sum(
            self.entries
        )


def stack_from_signature(signature: str) -> Stack:
    """``2w*2 1*1`` to ``Stack((2, 2, 1), (True, True, False))``.

    The inverse of `goc_deploy.compiler.plan.Predict.signature`.

    Raises:
        EngineDirError: the text is not a signature, or no kernel serves its launch.
    """
    units = updates_from_signature(signature)
    if len(units) > MAX_UNITS:
        raise EngineDirError(
            f"{signature!r} is a predict signature of {len(units)} units; a launch serves at most "
            f"{MAX_UNITS}"
        )
    return Stack(tuple(entries for entries, _ in units), tuple(stores for _, stores in units))


def parameters_from_addresses(
    stack: Stack, shape: Sequence[int], inputs: Sequence[int], outputs: Sequence[int]
) -> StackParameters:
    """Fill in the parameters of a launch.

    Args:
        stack: the units.
        shape: (B, T, D).
        inputs: addresses of x, gates, coefficients, then each unit's history, newest first.
        outputs: addresses of x_out, then of each prediction that is stored.
    """
    parameters = StackParameters(
        inputs[0], outputs[0], inputs[1], inputs[2], *shape, stack.units, 0
    )
    history, stored, coefficient = iter(inputs[3:]), iter(outputs[1:]), 0
    for unit, (entries, stores) in enumerate(zip(stack.entries, stack.stores, strict=True)):
        for entry in range(entries):
            parameters.history[unit][entry] = next(history)
        parameters.stored[unit] = next(stored) if stores else None
        parameters.coefficient[unit], parameters.entries[unit] = coefficient, entries
        coefficient += entries
    return parameters


@dataclass(frozen=True, slots=True)
class Geometry:
    """Which kernel runs, and on how many threads."""

    kernel: str
    threads: int

    @property
    def blocks(self) -> int:
        """Blocks of ``THREADS`` threads."""
        return -(-self.threads // THREADS)


def geometry(
    shape: Sequence[int],
    dtype: str,
    inputs: Sequence[int],
    outputs: Sequence[int],
    *,
    busy_blocks: int = BUSY_BLOCKS,
) -> Geometry:
    """Choose the access width: sixteen bytes if rows and addresses allow it, else one element.

    A thread serves the most tokens that divide T and leave enough blocks to keep the memory busy.
    It then reads the gates, which all tokens of a row share, less often.

    Args:
        shape: (B, T, D).
        dtype: dtype of all tensors but the coefficients, which are read one by one.
        inputs: addresses, see `parameters_from_addresses`.
        outputs: addresses, likewise.
        busy_blocks: number of blocks that keep the memory busy.
    """
    addresses = [*inputs[:2], *inputs[3:], *outputs]
    rows, tokens, hidden = shape
    vector = VECTOR_BYTES // DTYPE_BYTES[dtype]
    if hidden % vector or any(address % VECTOR_BYTES for address in addresses):
        return Geometry(f"goc_stack_{dtype}_single", rows * tokens * hidden)
    most = rows * tokens * hidden // vector
    fitting = (
        n for n in TOKENS_PER_THREAD if tokens % n == 0 and most // n >= busy_blocks * THREADS
    )
    per_thread = next(fitting, 1)
    return Geometry(f"goc_stack_{dtype}_{per_thread}", most // per_thread)


class Kernels(Protocol):
    """Runs kernels of ``update.cu``, ``accumulate.cu`` and ``moves.cu``."""

    def launch(self, geometry: Geometry, parameters: ctypes.Structure, stream: int) -> None:
        """Launch a kernel on a stream; neither wait nor allocate.

        Args:
            geometry: the kernel and its number of threads.
            parameters: parameters of this kernel.
            stream: handle of the stream.
        """
        ...


@dataclass(frozen=True, slots=True)
class DeviceKernels:
    """Kernels loaded into a CUDA context."""

    functions: Mapping[str, driver.DeviceFunction]

    def launch(self, geometry: Geometry, parameters: ctypes.Structure, stream: int) -> None:
        """See `Kernels`."""
        self.functions[geometry.kernel].launch(geometry.blocks, THREADS, parameters, stream)


@functools.cache
def cubin_for(capability: str) -> bytes:
    """Return the machine code of all kernels for a GPU; it is compiled once per process."""
    sources = [
        f'#line 1 "{path.name}"\n{path.read_text(encoding="utf-8")}'
        for path in (SOURCE_PATH, ACCUMULATE_SOURCE_PATH, MOVES_SOURCE_PATH)
    ]
    return nvrtc.cubin_from_source("".join(sources), SOURCE_PATH.name, capability)


def load_kernels(cuda: driver.Driver, cubin: bytes) -> DeviceKernels:
    """Load the kernels into the current CUDA context, which keeps them until the process ends."""
    return DeviceKernels(driver.functions_from_cubin(cuda, cubin, KERNELS))


def device_kernels() -> DeviceKernels:
    """Return the kernels of the current CUDA context, loaded once per context.

    Raises:
        EnvironmentUnsupportedError: NVRTC is missing or refuses the code, or there is no context.
    """
    return _loaded_kernels(driver.current_context(driver.load_driver()))


@functools.cache
def _loaded_kernels(_context: int) -> DeviceKernels:
    cuda = driver.load_driver()
    return load_kernels(cuda, cubin_for(driver.capability_of(cuda, cuda.cuCtxGetDevice())))
