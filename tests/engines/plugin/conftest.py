"""The plugin's kernels compiled for the host, from the source that GPUs get."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import pytest

from goc_deploy.engines.plugin.kernel import THREADS, Geometry
from tests.stand_ins import kernels


@dataclass(frozen=True, slots=True)
class HostKernels:
    """`goc_deploy.engines.plugin.kernel.Kernels` on host memory."""

    library: Any

    def launch(self, geometry: Geometry, parameters: ctypes.Structure, stream: int) -> None:
        assert stream == 0
        run = getattr(self.library, geometry.kernel)
        run(ctypes.byref(parameters), ctypes.c_int64(geometry.blocks * THREADS))


@pytest.fixture(scope="session")
def host_library() -> Any:
    return kernels.host_library()


@pytest.fixture(scope="session")
def host_kernels(host_library: Any) -> HostKernels:
    return HostKernels(host_library)
