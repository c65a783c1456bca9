"""The plugin's kernels compiled for the host, from the source that GPUs get."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from goc_deploy.engines.plugin.kernel import SOURCE_PATH, THREADS, Geometry


@dataclass(frozen=True, slots=True)
class HostKernels:
    """`goc_deploy.engines.plugin.kernel.Kernels` on host memory."""

    library: Any

    def launch(self, geometry: Geometry, parameters: ctypes.Structure, stream: int) -> None:
        assert stream == 0
        run = getattr(self.library, geometry.kernel)
        run(ctypes.byref(parameters), ctypes.c_int64(geometry.blocks * THREADS))


@pytest.fixture(scope="session")
def host_library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        pytest.skip("there is no C++ compiler to build the kernel for the host")
    target = tmp_path_factory.mktemp("host") / "update.so"
    source = Path(__file__).parent / "host.cpp"
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", "-fno-strict-aliasing"]
    subprocess.run(
        [compiler, *flags, "-shared", "-fPIC", f"-I{SOURCE_PATH.parent}", str(source), "-o", str(target)], check=True
    )
    library = ctypes.CDLL(str(target))
    for name in ("stack_size", "moves_size", "bytes_moved", "threads_per_block"):
        getattr(library, name).restype = ctypes.c_int64
    return library


@pytest.fixture(scope="session")
def host_kernels(host_library: Any) -> HostKernels:
    return HostKernels(host_library)
