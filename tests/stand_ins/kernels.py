"""Our kernels on host memory.

They are compiled for the host from the source that GPUs get, with the memory that a launch uses.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from goc_deploy.engines.plugin import nvrtc
from goc_deploy.engines.plugin.accumulate import TapsParameters
from goc_deploy.engines.plugin.kernel import SOURCE_PATH, StackParameters
from goc_deploy.engines.plugin.moves import CounterParameters, MoveParameters, MovesParameters
from goc_deploy.errors import EnvironmentUnsupportedError
from goc_deploy.precision import DTYPE_BYTES

HOST_SOURCE = Path(__file__).parents[1] / "engines" / "plugin" / "host.cpp"
FLAGS = (
    "-std=c++17",
    "-O2",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
)


class Fault(AssertionError):
    """Something that a GPU would not forgive."""


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
class Kernel:
    """A launch, with the bytes that it may read, does read and writes.

    Those that it does read are known once the step is known.
    """

    may_read: dict[str, Span]
    reads: Callable[[], dict[str, Span]]
    writes: dict[str, Span]
    run: Callable[[], None]


def build_library(target: Path, *more: Path) -> Path:
    """Compile the kernels for the host, with further sources.

    If there is no compiler, the test is skipped.
    """
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        pytest.skip("there is no C++ compiler to build the kernel for the host")
    sources = map(str, (HOST_SOURCE, *more))
    link = ["-shared", "-fPIC", f"-Wl,-soname,{target.name}", "-o", str(target), "-ldl"]
    subprocess.run([compiler, *FLAGS, f"-I{SOURCE_PATH.parent}", *sources, *link], check=True)
    return target


@functools.cache
def host_library() -> Any:
    """The kernels as a library for the host; skips the test where there is no compiler."""
    with tempfile.TemporaryDirectory() as folder:
        library = ctypes.CDLL(str(build_library(Path(folder, "update.so"))))
    for name in ("stack_size", "taps_size", "moves_size", "bytes_moved", "threads_per_block"):
        getattr(library, name).restype = ctypes.c_int64
    return library


def kernel_of(name: str, threads: int, address: int) -> Kernel:
    """A launch with the parameters at an address, which may change afterwards."""
    kinds: dict[str, tuple[type[ctypes.Structure], Any]] = {
        "goc_next_step": (CounterParameters, _counter),
        "goc_step_moves": (MovesParameters, _moves),
    }
    structure, spans = kinds.get(name, (StackParameters, functools.partial(_stack, name)))
    if name.startswith("goc_accumulate_"):
        structure, spans = TapsParameters, functools.partial(_taps, name)
    parameters = structure.from_buffer_copy(ctypes.string_at(address, ctypes.sizeof(structure)))
    run = getattr(host_library(), name)
    may_read, reads, writes = spans(parameters)
    return Kernel(
        may_read, reads, writes, lambda: run(ctypes.byref(parameters), ctypes.c_int64(threads))
    )


def _counter(parameters: CounterParameters) -> tuple[Any, ...]:
    span = {"step": Span(parameters.step, 4)}
    return span, lambda: span, span


def _moves(parameters: MovesParameters) -> tuple[Any, ...]:
    moves = [parameters.move[index] for index in range(parameters.moves)]

    def source(move: MoveParameters, first: int, steps: int) -> Span:
        one = move.outer * move.table_rows * move.row_bytes
        return Span(move.source + first * move.step_bytes, (steps - 1) * move.step_bytes + one)

    def with_rows(sources: dict[str, Span]) -> dict[str, Span]:
        rows = {
            f"rows of move {i}": Span(move.rows, 8 * move.batch_rows)
            for i, move in enumerate(moves)
            if move.rows
        }
        return {"step": Span(parameters.step, 4), **sources, **rows}

    def reads() -> dict[str, Span]:
        step = ctypes.c_int32.from_address(parameters.step).value
        if step < 0:
            raise Fault("a step moves before it was counted")
        return with_rows(
            {f"move {i}": source(move, step % move.period, 1) for i, move in enumerate(moves)}
        )

    may_read = with_rows(
        {f"move {i}": source(move, 0, move.period) for i, move in enumerate(moves)}
    )
    targets = {
        f"target {i}": Span(move.target, move.outer * move.batch_rows * move.row_bytes)
        for i, move in enumerate(moves)
    }
    return may_read, reads, targets


def _stack(name: str, stack: StackParameters) -> tuple[Any, ...]:
    dtype = next(part for part in name.split("_") if part in DTYPE_BYTES)
    row = stack.rows * stack.hidden * DTYPE_BYTES[dtype]
    feature, units = row * stack.tokens, range(stack.units)
    values = max(stack.coefficient[unit] + stack.entries[unit] for unit in units)
    reads = {
        "x": Span(stack.x, feature),
        "gates": Span(stack.gates, stack.units * row),
        "coefficients": Span(stack.coefficients, 4 * values),
    }
    reads |= {
        f"g{unit}_{entry}": Span(stack.history[unit][entry], feature)
        for unit in units
        for entry in range(stack.entries[unit])
    }
    writes = {"x_out": Span(stack.x_out, feature)}
    writes |= {
        f"g{unit}": Span(stack.stored[unit], feature) for unit in units if stack.stored[unit]
    }
    return reads, lambda: reads, writes


def _taps(name: str, launch: TapsParameters) -> tuple[Any, ...]:
    dtype = next(part for part in name.split("_") if part in DTYPE_BYTES)
    row = launch.rows * launch.hidden * DTYPE_BYTES[dtype]
    feature, taps = row * launch.tokens, range(launch.taps)
    reads = {"g": Span(launch.feature, feature)}
    reads["coefficients"] = Span(launch.coefficients, 4 * launch.taps)
    reads |= {f"gate{tap}": Span(launch.gates[tap], row) for tap in taps}
    reads |= {f"a{tap}": Span(launch.before[tap], feature) for tap in taps if launch.before[tap]}
    writes = {f"a{tap}_out": Span(launch.after[tap], feature) for tap in taps}
    return reads, lambda: reads, writes


def require_nvrtc() -> None:
    """Skip the test, with the reason, where NVRTC is not installed."""
    try:
        nvrtc.cubin_from_source("", "empty.cu", "8.6")
    except EnvironmentUnsupportedError as reason:
        if "cannot be loaded" not in str(reason):  # there, and broken
            raise
        pytest.skip(str(reason))
