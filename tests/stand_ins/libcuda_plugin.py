"""A pytest plugin for processes on the CUDA driver of host memory.

They have no torch and no onnx, and a stand-in for ONNX Runtime's provider.

The driver does its work at once, so what sessions read lies there already.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import numpy as np

from goc_deploy.engines.ort_cuda import OrtCudaBackend
from tests.stand_ins.driver import Work
from tests.stand_ins.kernels import Span
from tests.stand_ins.onnxruntime import StandInRuntime


class HostMemory:
    """What `StandInRuntime` needs of a device, at addresses of the process."""

    index = 0

    def stream_of(self, _handle: int) -> HostMemory:
        return self

    def put(self, work: Work) -> None:
        work.run()

    def bytes_at(self, span: Span, _what: str) -> np.ndarray:
        return np.ctypeslib.as_array((ctypes.c_uint8 * span.nbytes).from_address(span.start))


def _nothing(_backend: Any, *, shared_pool: bool) -> None:
    """There are no CUDA libraries to load, and no arena on a GPU."""


for name in ("torch", "onnx"):
    assert name not in sys.modules
    sys.modules[name] = None  # type: ignore[assignment]  # to import it is an error from here on
OrtCudaBackend.runtime = StandInRuntime(HostMemory())
OrtCudaBackend.prepare_process = _nothing
