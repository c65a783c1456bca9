"""The CUDA device on a stand-in for the driver: copies, marks, graphs, memory, threads."""

from __future__ import annotations

import gc
import threading
import weakref

import numpy as np
import pytest

from goc_deploy.engines import cuda, driver
from goc_deploy.engines.cuda import STAGING_BYTES, cuda_device
from goc_deploy.engines.driver import Driver
from goc_deploy.errors import EnvironmentUnsupportedError, ResourceError
from goc_deploy.protocols import Buffer, Move, Run
from tests.stand_ins.device import StandInDevice
from tests.stand_ins.driver import OUT_OF_MEMORY, SUCCESS
from tests.stand_ins.kernels import Fault


@pytest.fixture
def device() -> StandInDevice:
    return StandInDevice()


def copying(device: StandInDevice) -> tuple[cuda.CudaStream, Buffer, Buffer, Run]:
    """A stream, two buffers with values, and a copy from one to the other."""
    stream, source, target = (
        device.stream(),
        device.allocate((8,), "float32"),
        device.allocate((8,), "float32"),
    )
    stream.upload(np.arange(8), source)
    stream.upload(np.zeros(8), target)
    return stream, source, target, lambda: stream.copy(source, target)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int64", "int32"])
def test_values_come_back_also_from_a_view(device: StandInDevice, dtype: str) -> None:
    stream, memory = device.stream(), device.allocate((4, 64), dtype)
    values = np.arange(-64, 64).reshape(2, 64)
    values.flags.writeable = False
    stream.upload(values, memory.view(2, 64, start=128))
    found = stream.download(memory.view(64, 2, start=128))
    assert found.dtype == np.dtype("float32" if dtype == "bfloat16" else dtype)
    np.testing.assert_array_equal(found, values.reshape(64, 2))


def test_uploads_go_through_pinned_memory_so_that_values_may_change_at_once(
    device: StandInDevice,
) -> None:
    stream, memory = device.stream(), device.allocate((3, STAGING_BYTES // 4), "float32")
    values = np.random.default_rng(0).standard_normal(memory.shape).astype(np.float32)
    expected = values.copy()
    stream.upload(values[0], memory.view(STAGING_BYTES // 4))
    values[0] = 0  # the stand-in copies only when somebody waits
    stream.upload(values[1:], memory.view(2, STAGING_BYTES // 4, start=STAGING_BYTES // 4))
    values[:] = 0
    np.testing.assert_array_equal(stream.download(memory), expected)


def test_a_copy_stays_on_the_device(device: StandInDevice) -> None:
    stream, source, target, copy = copying(device)
    copy()
    np.testing.assert_array_equal(stream.download(target), np.arange(8))
    stream.copy(source.view(4, start=4), target.view(4))
    np.testing.assert_array_equal(stream.download(target.view(4)), [4, 5, 6, 7])


def test_launches_are_captured_once_and_replayed(device: StandInDevice) -> None:
    stream, source, target, copy = copying(device)
    (replay,) = stream.recorded([copy])
    assert not stream.download(target).any()  # capturing runs nothing
    stream.upload(np.full(8, 3), source)
    replay()
    np.testing.assert_array_equal(stream.download(target), np.full(8, 3))
    assert (device.recorded.graphs, device.recorded.nodes) == (1, 1)
    launches = [copy]
    assert device.stream(graphs=False).recorded(launches) is launches
    assert StandInDevice(graphs=False).stream().recorded(launches) is launches


def test_after_a_capture_that_fails_launches_are_made_one_by_one(
    device: StandInDevice, caplog: pytest.LogCaptureFixture
) -> None:
    stream, _, target, copy = copying(device)

    def failing() -> None:
        raise EnvironmentUnsupportedError("TensorRT refuses")

    launches = [copy, failing]
    assert stream.recorded(launches) is launches
    assert "TensorRT refuses" in caplog.text
    copies = [copy]
    assert stream.recorded(copies) is copies  # not tried again
    copy()
    np.testing.assert_array_equal(stream.download(target), np.arange(8))
    other, _, _, copy_there = copying(device)
    assert other.recorded([copy_there]) != [copy_there]  # another stream may


def test_a_graph_that_the_driver_refuses_is_no_failure_of_the_request(
    device: StandInDevice, caplog: pytest.LogCaptureFixture
) -> None:
    stream, _, _, copy = copying(device)
    device.gpu.refusal = OUT_OF_MEMORY
    launches = [copy]
    assert stream.recorded(launches) is launches
    assert "refuses cuGraphInstantiate: CUDA_ERROR_OUT_OF_MEMORY" in caplog.text
    device.gpu.refusal = SUCCESS


def test_bugs_are_not_taken_for_refusals(device: StandInDevice) -> None:
    stream, *_ = copying(device)
    with pytest.raises(Fault, match="allocate: illegal while a stream is captured"):
        stream.recorded([lambda: device.allocate((1,), "float32")])
    with pytest.raises(Fault, match="an empty graph"):
        stream.recorded([])


def test_what_a_capture_would_not_forgive_is_freed_after_it(device: StandInDevice) -> None:
    stream, _, _, copy = copying(device)
    held = [device.allocate((1024,), "float32")]
    gone = weakref.ref(held[0].owner)

    def collecting() -> None:
        held.clear()
        gc.collect()
        assert gone() is None

    free = device.free_bytes()
    stream.recorded([copy, collecting])
    assert device.free_bytes() == free + 4096


def test_threads_capture_one_after_the_other(device: StandInDevice) -> None:
    failures: list[BaseException] = []

    def work() -> None:
        try:
            stream, _, _, copy = copying(device)
            for _ in range(5):
                (replay,) = stream.recorded([copy])
                replay()
                stream.wait()
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert device.recorded.graphs == 20


@pytest.mark.parametrize("what", ["another capture", "the end of a graph"])
def test_a_capture_holds_off_what_could_break_it(device: StandInDevice, what: str) -> None:
    (stream, _, _, copy), (other, _, _, copy_there) = copying(device), copying(device)
    replays = [*other.recorded([copy_there])]
    inside, go_on = threading.Event(), threading.Event()

    def stopping() -> None:
        inside.set()
        go_on.wait(30)

    def break_it() -> None:
        if what == "another capture":
            replays.extend(other.recorded([copy_there]))
        else:
            replays.clear()  # the last references to the graph

    threads = [
        threading.Thread(target=work)
        for work in (lambda: stream.recorded([copy, stopping]), break_it)
    ]
    threads[0].start()
    assert inside.wait(30)
    threads[1].start()
    threads[1].join(0.2)
    waited = threads[1].is_alive()
    go_on.set()
    for thread in threads:
        thread.join(30)
    assert waited
    assert device.recorded.graphs == (3 if what == "another capture" else 2)


def test_a_stream_is_for_the_thread_that_holds_it(device: StandInDevice) -> None:
    stream, source, target, copy = copying(device)
    order: list[str] = []

    def work() -> None:
        with stream.held():
            order.append("second")
            stream.copy(target, source)
            stream.wait()

    with stream.held():
        copy()
        thread = threading.Thread(target=work)
        thread.start()
        thread.join(0.05)
        order.append("first")
        stream.wait()
    thread.join()
    assert order == ["first", "second"]


def test_marks_are_events_that_are_made_once(device: StandInDevice) -> None:
    stream = device.stream()
    for _ in range(2):
        for index in range(4):
            stream.mark(index)
        marks = stream.marked_ms(4)
        assert marks[0] == 0
        assert marks == sorted(marks)
    assert device.calls.count(("event", 0)) == 4


def test_a_step_is_counted_and_its_values_moved(device: StandInDevice) -> None:
    stream = device.stream()
    table, rows = device.allocate((3, 2, 2, 4), "float32"), device.allocate((3,), "int64")
    target, step = device.allocate((2, 3, 4), "float32"), device.allocate((1,), "int32")
    values = np.arange(48, dtype=np.float32).reshape(3, 2, 2, 4)
    for content, buffer in ((values, table), (np.array([1, 0, 1]), rows), (np.array([-1]), step)):
        stream.upload(content, buffer)
    start = device.step_start([Move(table.view(2, 2, 4), target, 3, 16, rows)], step, stream)
    for k in range(4):
        start()
        np.testing.assert_array_equal(stream.download(target), values[k % 3][:, [1, 0, 1]])


def test_the_device_describes_itself_and_its_memory(device: StandInDevice) -> None:
    described = device.describe()
    assert described["device"] == "a stand-in on host memory"
    assert (
        described["compute_capability"],
        described["device_index"],
        described["cuda_graphs"],
    ) == ("8.9", 0, True)
    with pytest.raises(ResourceError, match=r"8.59 GB cannot be allocated on the GPU"):
        device.allocate((2**31,), "float32")


def test_a_missing_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    bindings = StandInDevice().gpu
    monkeypatch.setattr(cuda, "load_driver", lambda: Driver(bindings))
    assert cuda_device().index == 0
    with pytest.raises(
        EnvironmentUnsupportedError, match="there is no CUDA device 1; the driver finds 1"
    ):
        cuda_device(1)


def test_without_a_driver_or_its_bindings_the_reason_is_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    driver.load_driver.cache_clear()
    monkeypatch.setattr(driver.ctypes, "CDLL", missing)
    with pytest.raises(EnvironmentUnsupportedError, match="there is no NVIDIA driver here"):
        driver.device_capability()
    monkeypatch.setattr(driver.ctypes, "CDLL", lambda _name: None)
    monkeypatch.setitem(__import__("sys").modules, "cuda.bindings", None)
    with pytest.raises(
        EnvironmentUnsupportedError, match=r"cuda-bindings.* pip install 'goc_deploy\[cuda\]'"
    ):
        driver.device_capability()
