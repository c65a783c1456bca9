"""The stand-ins refuse what a GPU would not forgive."""

from __future__ import annotations

import gc

import numpy as np
import pytest

from goc_deploy.errors import ResourceError
from goc_deploy.protocols import Buffer
from tests.stand_ins.device import Fault, Span, StandInDevice, StandInStream, Work


def filled(device: StandInDevice, stream: StandInStream, *values: float) -> Buffer:
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


def test_work_is_done_in_order_and_only_when_somebody_waits(device: StandInDevice) -> None:
    stream = device.stream()
    source, target = filled(device, stream, 1, 2), device.allocate((2,), "float32")
    stream.put(doubling(device, source, target))
    stream.upload(np.array([5, 5]), source)
    assert np.isnan(device.bytes_at(span(source), "source").view(np.float32)).all()
    np.testing.assert_array_equal(stream.download(target), [2, 4])


def test_fresh_and_freed_memory_is_nan_and_may_not_be_read(device: StandInDevice) -> None:
    stream = device.stream()
    fresh, gone = device.allocate((2,), "float32"), filled(device, stream, 1, 2)
    with pytest.raises(Fault, match="reads source, which nobody wrote"):
        stream.download(fresh)
    stream.pending.clear()
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
        second.put(doubling(device, source, target))
    first.wait()
    second.put(doubling(device, source, target))
    first.put(Work("reading the same", {"source": span(source)}, {}, lambda: None))
    with pytest.raises(Fault, match="reading the result races with doubling"):
        first.put(Work("reading the result", {"target": span(target)}, {}, lambda: None))


def test_a_graph_repeats_what_was_captured_on_what_lies_there_then(device: StandInDevice) -> None:
    stream = device.stream()
    source, target = filled(device, stream, 1, 2), device.allocate((2,), "float32")
    (replay,) = stream.recorded([lambda: stream.put(doubling(device, source, target))])
    assert np.isnan(device.bytes_at(span(target), "target").view(np.float32)).all()  # capturing runs nothing
    for value in (3, 4):
        stream.upload(np.full(2, value), source)
        replay()
        np.testing.assert_array_equal(stream.download(target), [2 * value] * 2)


@pytest.mark.parametrize("call", ["allocate", "wait", "upload", "download", "mark", "stream"])
def test_calls_that_cuda_forbids_during_capture_are_refused(device: StandInDevice, call: str) -> None:
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


def test_an_empty_capture_and_too_much_memory_are_refused(device: StandInDevice) -> None:
    with pytest.raises(Fault, match="an empty graph"):
        device.stream().recorded([])
    with pytest.raises(ResourceError, match="do not fit"):
        device.allocate((device.capacity,), "float32")
