"""The runtime's device layer and the update kernel, as the benchmarks use them.

They run on the card or, in a dry run, on the host.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.on_gpu.jobs import ROOT
from goc_deploy.engines.plugin.kernel import (
    SOURCE_PATH,
    THREADS,
    Geometry,
    Kernels,
    Stack,
    StackParameters,
    device_kernels,
    geometry,
    parameters_from_addresses,
)
from goc_deploy.protocols import Buffer, Device, Run, Stream

HOST_SOURCE = ROOT / "tests" / "engines" / "plugin" / "host.cpp"


def device_here(*, dry: bool) -> Device:
    """The first card, or the host."""
    if dry:
        from goc_deploy.engines.host import HostDevice

        return HostDevice()
    from goc_deploy.engines.cuda import cuda_device

    device = cuda_device()
    device.allocate((1,), "uint8")  # makes the CUDA context, which the kernels are loaded into
    return device


def kernels_here(*, dry: bool) -> Kernels:
    """The update kernel compiled for the card, or for the host.

    Raises:
        RuntimeError: there is no C++ compiler to build it for the host.
    """
    if not dry:
        return device_kernels()
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        raise RuntimeError("there is no C++ compiler to build the kernel for the host")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "update.so"
        flags = [
            "-std=c++17",
            "-O1",
            "-fno-strict-aliasing",
            "-shared",
            "-fPIC",
            f"-I{SOURCE_PATH.parent}",
        ]
        subprocess.run([compiler, *flags, str(HOST_SOURCE), "-o", str(target)], check=True)
        return _HostKernels(ctypes.CDLL(str(target)))


class _HostKernels:
    """See `goc_deploy.engines.plugin.kernel.Kernels`."""

    def __init__(self, library: Any) -> None:
        self._library = library

    def launch(self, geometry: Geometry, parameters: StackParameters, stream: int) -> None:  # noqa: ARG002
        run = getattr(self._library, geometry.kernel)
        run(ctypes.byref(parameters), ctypes.c_int64(geometry.blocks * THREADS))


def stack_launch(
    device: Device,
    stream: Stream,
    kernels: Kernels,
    stack: Stack,
    shape: tuple[int, int, int],
    dtype: str,
) -> Run:
    """A launch of the update kernel on fresh memory with random values.

    Predictions are written over the entries that die.
    """
    rows, _, hidden = shape
    rng = np.random.default_rng(0)
    values = rng.standard_normal(shape).astype(np.float32)
    coefficients = [
        weight for count in stack.entries for weight in (0.01, -0.5, 0.1, -0.1)[:count]
    ]  # sums stay small

    def filled(content: np.ndarray, kind: str) -> Buffer:
        target = device.allocate(content.shape, kind)
        stream.upload(content, target)
        return target

    x, gates = (
        filled(values, dtype),
        filled(rng.standard_normal((stack.units, rows, hidden)).astype(np.float32), dtype),
    )
    weights = filled(np.array(coefficients, np.float32), "float32")
    history = [device.allocate(shape, dtype) for _ in coefficients]
    for entry in history:
        stream.copy(x, entry)
    ends = np.cumsum(stack.entries)  # of each unit's entries, of which the last one dies
    stored = [history[end - 1] for end, stores in zip(ends, stack.stores, strict=True) if stores]
    buffers = [x, gates, weights, *history]
    addresses = [b.pointer for b in buffers], [x.pointer, *(b.pointer for b in stored)]
    chosen, parameters = (
        geometry(shape, dtype, *addresses),
        parameters_from_addresses(stack, shape, *addresses),
    )

    def launch(_: Any = buffers) -> None:
        kernels.launch(chosen, parameters, stream.handle)

    return launch


def microseconds(stream: Stream, launches: Sequence[Run], count: int, repeats: int) -> float:
    """Median time of one of ``count`` launches between two marks, calling all of ``launches``."""
    times = []
    for repeat in range(repeats + 2):
        stream.mark(0)
        for launch in launches:
            launch()
        stream.mark(1)
        if repeat >= 2:
            times.append(1e3 * stream.marked_ms(2)[1] / count)
        else:
            stream.wait()
    return median(times)


def saver(path: Path) -> Callable[[Any], None]:
    """Write findings, whole or not at all.

    It is called for every new finding, so a crash loses none that was made before.
    """

    def save(found: Any) -> None:
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)

    return save
