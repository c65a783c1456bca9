"""The CUDA device on torch's CPU memory: copies, marks and the order of calls, with `torch.cuda` replaced."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from goc_deploy.engines.cuda import CudaDevice, cuda_device
from goc_deploy.errors import EnvironmentUnsupportedError, ResourceError
from goc_deploy.protocols import ALIGNMENT


class Torch:
    """torch with calls of ``cuda`` that only write down that they were made."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        say, now = self.calls.append, iter(range(1000))

        class Graph:
            def capture_begin(self, capture_error_mode: str) -> None:
                say(f"begin {capture_error_mode}")

            def capture_end(self) -> None:
                say("end")

            def replay(self) -> None:
                say("replay")

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self, stream: Any) -> None:
                assert stream.cuda_stream == 7
                self.at = next(now)

            def elapsed_time(self, other: Event) -> float:
                return float(other.at - self.at)

        self.uint8, self.from_numpy = torch.uint8, torch.from_numpy
        self.cuda = SimpleNamespace(
            Stream=lambda _device: SimpleNamespace(cuda_stream=7, synchronize=lambda: say("wait")),
            stream=lambda _stream: contextlib.nullcontext(),
            CUDAGraph=Graph,
            Event=Event,
            OutOfMemoryError=torch.cuda.OutOfMemoryError,
            memory_reserved=lambda _device: 5,
            memory_allocated=lambda _device: 2,
            mem_get_info=lambda _device: (100, 200),
            get_device_capability=lambda _device: (8, 9),
            get_device_name=lambda _device: "a GPU",
        )

    def empty(self, nbytes: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        if nbytes > 2**30:
            raise torch.cuda.OutOfMemoryError("no")
        memory = torch.full((nbytes + ALIGNMENT,), 255, dtype=dtype, device=device)
        start = -memory.data_ptr() % ALIGNMENT
        return memory[start : start + nbytes]


@pytest.fixture
def device() -> CudaDevice:
    return CudaDevice(Torch(), torch.device("cpu"), graphs=True)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int64"])
def test_values_come_back_also_from_a_view(device: CudaDevice, dtype: str) -> None:
    stream, memory = device.stream(), device.allocate((4, 64), dtype)
    values = np.arange(-64, 64).reshape(2, 64)
    values.flags.writeable = False
    stream.upload(values, memory.view(2, 64, start=128))
    found = stream.download(memory.view(64, 2, start=128))
    assert found.dtype == np.dtype("float32" if dtype == "bfloat16" else dtype)
    np.testing.assert_array_equal(found, values.reshape(64, 2))


def test_a_copy_stays_on_the_device(device: CudaDevice) -> None:
    stream, source, target = device.stream(), device.allocate((8,), "float16"), device.allocate((8,), "float16")
    stream.upload(np.arange(8), source)
    stream.copy(source.view(4, start=4), target.view(4))
    np.testing.assert_array_equal(stream.download(target.view(4)), [4, 5, 6, 7])


def test_launches_are_captured_once_and_replayed(device: CudaDevice) -> None:
    stream, calls = device.stream(), device._torch.calls
    (replay,) = stream.recorded([lambda: calls.append("a"), lambda: calls.append("b")])
    replay()
    assert calls == ["wait", "begin thread_local", "a", "b", "end", "replay"]

    def failing() -> None:
        raise EnvironmentUnsupportedError("refused")

    with pytest.raises(EnvironmentUnsupportedError):
        stream.recorded([failing])
    assert calls[-1] == "end"
    launches = [lambda: None]
    assert CudaDevice(Torch(), None, graphs=False).stream().recorded(launches) is launches


def test_marks_are_events_that_are_made_once(device: CudaDevice) -> None:
    stream = device.stream()
    for _ in range(2):
        for index in range(4):
            stream.mark(index)
        assert stream.marked_ms(4) == [0, 1, 2, 3]
    assert len(stream._events) == 4


def test_the_device_describes_itself_and_its_memory(device: CudaDevice) -> None:
    assert device.describe() == {"device": "a GPU", "compute_capability": "8.9", "cuda_graphs": True}
    assert device.free_bytes() == 103
    with pytest.raises(ResourceError, match=r"4.29 GB cannot be allocated on the GPU"):
        device.allocate((2**30,), "float32")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so() -> None:
    with pytest.raises(EnvironmentUnsupportedError, match=r"torch .* finds no CUDA device"):
        cuda_device()
