"""Tests that only the CUDA driver of host memory can make.

They show that nothing is left over, and what happens if the driver refuses.

`tests.engines.test_cuda_bindings` runs these tests in a process of their own.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from goc_deploy.engines.cuda import cuda_device
from goc_deploy.engines.driver import load_driver
from goc_deploy.errors import EnvironmentUnsupportedError, ResourceError


@pytest.fixture
def libcuda() -> Iterator[Any]:
    library = ctypes.CDLL("libcuda.so.1")
    library.stub_live_handles.restype = ctypes.c_size_t
    library.stub_capacity.argtypes = [ctypes.c_size_t]
    yield library
    library.stub_capacity(2**31)
    library.stub_instantiation(0)


def test_all_that_was_made_is_destroyed(libcuda: Any) -> None:
    def work() -> int:
        device = cuda_device()
        stream, buffers = device.stream(), [device.allocate((4,), "float32") for _ in range(2)]
        stream.upload(np.arange(4), buffers[0])
        replays = stream.recorded([lambda: stream.copy(*buffers)])
        stream.mark(0)
        stream.mark(1)
        assert len(replays) == 1
        return int(libcuda.stub_live_handles())

    gc.collect()
    before = libcuda.stub_live_handles()
    assert work() == before + 2 + 1 + 1 + 1 + 2  # buffers, stream, pinned memory, graph, marks
    gc.collect()
    assert libcuda.stub_live_handles() == before


@pytest.mark.parametrize(
    ("status", "text"), [(2, "out of memory (2)"), (702, "unknown error (702)")]
)
def test_a_graph_that_is_refused_leaves_nothing(
    libcuda: Any, caplog: pytest.LogCaptureFixture, status: int, text: str
) -> None:
    device = cuda_device()
    stream, source, target = device.stream(), *(device.allocate((4,), "float32") for _ in range(2))
    stream.upload(np.arange(4), source)
    launches = [lambda: stream.copy(source, target)]
    before = libcuda.stub_live_handles()
    libcuda.stub_instantiation(status)
    assert stream.recorded(launches) is launches
    assert f"the NVIDIA driver refuses cuGraphInstantiate: {text}" in caplog.text
    launches[0]()
    assert stream.download(target).tolist() == [0, 1, 2, 3]
    assert libcuda.stub_live_handles() == before


def test_memory_ends_where_the_driver_has_no_more(libcuda: Any) -> None:
    device = cuda_device()
    libcuda.stub_capacity(2**20)
    with pytest.raises(
        ResourceError, match=r"0.00 GB cannot be allocated on the GPU; use a smaller batch size"
    ):
        device.allocate((2**20,), "float32")
    assert device.allocate((1,), "float32").nbytes == 4


def test_arguments_that_do_not_fit_are_refused_by_name() -> None:
    device = cuda_device()
    stream, buffer = device.stream(), device.allocate((4,), "float32")
    host = np.zeros(4, np.uint8)
    with pytest.raises(
        EnvironmentUnsupportedError, match=r"cuMemcpyDtoDAsync: invalid argument \(1\)"
    ):
        stream.copy(buffer, device.allocate((5,), "float32"))
    with pytest.raises(EnvironmentUnsupportedError, match="cuMemcpyHtoDAsync: invalid argument"):
        device.driver.cuMemcpyHtoDAsync(host.ctypes.data, buffer.pointer, 4, stream.handle)
    with pytest.raises(
        EnvironmentUnsupportedError, match="cuStreamSynchronize: invalid resource handle"
    ):
        device.driver.cuStreamSynchronize(buffer.pointer)
    with pytest.raises(
        EnvironmentUnsupportedError, match=r"cuModuleLoadData: unknown error \(200\)"
    ):
        load_driver().cuModuleLoadData(b"no machine code")


def test_memory_of_one_device_is_no_memory_of_another() -> None:
    first, second = cuda_device(0), cuda_device(1)
    stream, buffer = first.stream(), second.allocate((4,), "float32")
    with pytest.raises(EnvironmentUnsupportedError, match="invalid argument"):
        stream.upload(np.arange(4), buffer)
    assert second.describe()["device"] == "stub 1"
