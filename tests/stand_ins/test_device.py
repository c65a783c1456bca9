"""The stand-ins refuse what a GPU would not forgive."""

from __future__ import annotations

import gc
import threading

import numpy as np
import pytest

from goc_deploy.engines.cuda import CudaStream
from goc_deploy.protocols import Buffer
from tests.stand_ins.device import StandInDevice
from tests.stand_ins.driver import Work
from tests.stand_ins.kernels import Fault, Span


def filled(device: StandInDevice, stream: CudaStream, *values: float) -> Buffer:
    buffer = device.allocate((len(values),), "float32")
    stream.upload(np.array(values), buffer)
    return buffer


def span(buffer: Buffer) -> Span:
    return Span(buffer.pointer, buffer.nbytes)


def doubling(device: StandInDevice, source: Buffer, target: Buffer) -> Work:
    def run() -> None:
        values = device.bytes_at(span(source), "source").view(np.float32)
        device.bytes_at(span(target), "target").view(np.float32)[:] = 2 * values

    return Work("doubling", {"source": span(source)}, {"target": span(target)}, run)


@pytest.fixture
def device() -> StandInDevice:
    return StandInDevice()


def put(device: StandInDevice, stream: CudaStream, work: Work) -> None:
    """What a launch does."""
    device.stream_of(stream.handle).put(work)


def test_work_is_done_in_order_and_only_when_somebody_waits(device: StandInDevice) -> None:
    stream = device.stream()
    source, target = filled(device, stream, 1, 2), device.allocate((2,), "float32")
    put(device, stream, doubling(device, source, target))
    stream.upload(np.array([5, 5]), source)
    assert np.isnan(device.bytes_at(span(source), "source").view(np.float32)).all()
    np.testing.assert_array_equal(stream.download(target), [2, 4])


def test_fresh_and_freed_memory_is_nan_and_may_not_be_read(device: StandInDevice) -> None:
    stream = device.stream()
    fresh, gone = device.allocate((2,), "float32"), filled(device, stream, 1, 2)
    with pytest.raises(Fault, match="reads source, which nobody wrote"):
        stream.download(fresh)
    device.stream_of(stream.handle).pending.clear()
    stream.upload(np.ones(2), gone)
    stream.wait()
    address = span(gone)
    del gone
    gc.collect()
    with pytest.raises(Fault, match="memory that was freed"):
        device.bytes_at(address, "this")
    with pytest.raises(Fault, match="lies in no allocation"):
        device.bytes_at(Span(4096, 4), "this")


def test_streams_that_do_not_wait_for_each_other_race(device: StandInDevice) -> None:
    first, second = device.stream(), device.stream()
    source, target = filled(device, first, 1, 2), device.allocate((2,), "float32")
    with pytest.raises(Fault, match="doubling races with upload on another stream"):
        put(device, second, doubling(device, source, target))
    first.wait()
    put(device, second, doubling(device, source, target))
    put(device, first, Work("reading the same", {"source": span(source)}, {}, lambda: None))
    with pytest.raises(Fault, match="reading the result races with doubling"):
        put(device, first, Work("reading the result", {"target": span(target)}, {}, lambda: None))


def test_a_graph_repeats_what_was_captured_on_what_lies_there_then(device: StandInDevice) -> None:
    stream = device.stream()
    source, target = filled(device, stream, 1, 2), device.allocate((2,), "float32")
    (replay,) = stream.recorded([lambda: put(device, stream, doubling(device, source, target))])
    assert np.isnan(
        device.bytes_at(span(target), "target").view(np.float32)
    ).all()  # capturing runs nothing
    for value in (3, 4):
        stream.upload(np.full(2, value), source)
        replay()
        np.testing.assert_array_equal(stream.download(target), [2 * value] * 2)


@pytest.mark.parametrize("call", ["allocate", "wait", "upload", "download", "mark", "stream"])
def test_calls_that_cuda_forbids_during_capture_are_refused(
    device: StandInDevice, call: str
) -> None:
    stream = device.stream()
    buffer = filled(device, stream, 1, 2)
    calls = {
        "allocate": lambda: device.allocate((1,), "float32"),
        "wait": stream.wait,
        "upload": lambda: stream.upload(np.ones(2), buffer),
        "download": lambda: stream.download(buffer),
        "mark": lambda: stream.mark(0),
        "stream": device.stream,
    }
    with pytest.raises(Fault, match="illegal while a stream is captured"):
        stream.recorded([calls[call]])
    calls[call]()  # and fine afterwards


def test_a_thread_needs_the_context_of_the_device(device: StandInDevice) -> None:
    failures: list[BaseException] = []

    def work() -> None:
        try:
            device.gpu.cuMemAlloc(1)
        except BaseException as failure:
            failures.append(failure)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert "this thread has no context" in str(failures[0])


def test_two_threads_may_not_use_a_stream_between_waits(device: StandInDevice) -> None:
    stream = device.stream()
    buffer = filled(device, stream, 1, 2)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            stream.upload(np.ones(2), buffer)
        except BaseException as failure:
            failures.append(failure)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert "another thread uses" in str(failures[0])


def test_host_memory_must_be_pinned_and_captures_one_at_a_time(device: StandInDevice) -> None:
    stream = device.stream()
    buffer = filled(device, stream, 1, 2)
    values = np.ones(2, np.float32)
    with pytest.raises(Fault, match="not pinned"):
        device.gpu.cuMemcpyHtoDAsync(buffer.pointer, values.ctypes.data, 8, stream.handle)
    mode = device.gpu.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
    device.gpu.cuStreamBeginCapture(stream.handle, mode)
    with pytest.raises(Fault, match="two captures"):
        device.gpu.cuStreamBeginCapture(device.stream_of(stream.handle), mode)
    with pytest.raises(Fault, match="destroyed while a thread captures"):
        device.gpu.cuGraphExecDestroy([])
    device.gpu.cuStreamEndCapture(stream.handle)
