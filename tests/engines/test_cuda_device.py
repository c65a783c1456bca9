"""The CUDA device by the real cuda-bindings.

It is on a GPU, or on the driver of host memory (`tests.engines.test_cuda_bindings`).
"""

from __future__ import annotations

import gc
import threading

import numpy as np
import pytest

from goc_deploy.engines.cuda import STAGING_BYTES, CudaDevice, CudaStream, cuda_device
from goc_deploy.engines.driver import load_driver
from goc_deploy.engines.plugin.kernel import stack_from_signature
from goc_deploy.engines.plugin.predict import PredictKernel
from goc_deploy.errors import EnvironmentUnsupportedError, ResourceError
from goc_deploy.protocols import Buffer, Move, Run
from tests.engines.plugin.arrays import assert_close, random_case

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("gpu")]


@pytest.fixture
def device() -> CudaDevice:
    return cuda_device()


def placed(device: CudaDevice, stream: CudaStream, values: np.ndarray, dtype: str) -> Buffer:
    """A buffer with values."""
    buffer = device.allocate(values.shape, dtype)
    stream.upload(values, buffer)
    return buffer


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_copies_larger_than_the_pinned_memory_come_back(device: CudaDevice, dtype: str) -> None:
    stream, shape = device.stream(), (3, STAGING_BYTES // 4 + 5)
    values = np.random.default_rng(0).integers(-128, 128, shape).astype(np.float32)
    expected = values.copy()
    source, target = placed(device, stream, values, dtype), device.allocate(shape, dtype)
    values[:] = 0
    stream.copy(source, target)
    np.testing.assert_array_equal(stream.download(target), expected)
    np.testing.assert_array_equal(stream.download(target.view(7, start=shape[1])), expected[1, :7])


def test_a_graph_repeats_the_start_of_a_step_a_copy_and_a_prediction(device: CudaDevice) -> None:
    stream, kernel = device.stream(), PredictKernel("2w*3", "float32", device.kernels)
    case = random_case(stack_from_signature("2w*3"), (2, 16, 64), "float32", 0)
    names = [
        "x",
        "gates",
        "coefficients",
        *(f"g{unit}_{entry}" for unit in range(3) for entry in range(2)),
    ]
    inputs = {
        name: placed(device, stream, values, "float32")
        for name, values in zip(names, case.inputs, strict=True)
    }
    outputs = {"x_out": device.allocate(case.x.shape, "float32")}
    outputs |= {f"g{unit}": device.allocate(case.x.shape, "float32") for unit in range(3)}
    table = np.arange(48, dtype=np.float32).reshape(3, 2, 2, 4)
    source, rows = (
        placed(device, stream, table, "float32"),
        placed(device, stream, np.array([1, 0, 1]), "int64"),
    )
    step = placed(device, stream, np.array([-1]), "int32")
    moved, kept = (device.allocate((2, 3, 4), "float32") for _ in range(2))
    launches: list[Run] = [
        device.step_start([Move(source.view(2, 2, 4), moved, 3, 16, rows)], step, stream),
        lambda: stream.copy(moved, kept),
        kernel.bind(inputs, outputs, stream),
    ]
    stream.wait()
    (replay,) = stream.recorded(launches)
    assert (device.recorded.graphs, device.recorded.nodes) == (1, 4)
    assert stream.download(step).tolist() == [-1]  # recording runs nothing
    for number in range(4):
        replay()
        assert stream.download(step).tolist() == [number]
        np.testing.assert_array_equal(stream.download(kept), table[number % 3][:, [1, 0, 1]])
    for output, expected in zip(outputs.values(), [case.x_out, *case.stored], strict=True):
        assert_close(stream.download(output), expected, "float32", 100)


def test_marks_of_a_stream_count_the_time_of_the_device(device: CudaDevice) -> None:
    stream = device.stream()
    source = placed(device, stream, np.zeros(2**20, np.float32), "float32")
    target = device.allocate(source.shape, "float32")
    for _ in range(2):
        for index in range(3):
            stream.mark(index)
            stream.copy(source, target)
        marks = stream.marked_ms(3)
        assert marks[0] == 0
        assert 0 < marks[1] < marks[2] < 1e3


def test_the_device_has_its_memory_back(device: CudaDevice) -> None:
    device.allocate((1,), "float32")  # the context exists
    before = device.free_bytes()
    held = [device.allocate((2**24,), "float32") for _ in range(4)]
    assert (before or 0) - (device.free_bytes() or 0) >= 2**28
    del held
    gc.collect()
    assert device.free_bytes() == before


def test_more_than_the_device_has_is_refused(device: CudaDevice) -> None:
    with pytest.raises(ResourceError, match="GB cannot be allocated on the GPU"):
        device.allocate((device.free_bytes() or 0,), "float32")


def test_a_stream_goes_on_after_a_capture_that_fails(
    device: CudaDevice, caplog: pytest.LogCaptureFixture
) -> None:
    stream = device.stream()
    source, target = (
        placed(device, stream, np.arange(4), "float32"),
        device.allocate((4,), "float32"),
    )

    def failing() -> None:
        raise EnvironmentUnsupportedError("a launch fails")

    launches: list[Run] = [lambda: stream.copy(source, target), failing]
    assert stream.recorded(launches) is launches
    assert "a launch fails" in caplog.text
    launches[0]()
    assert stream.download(target).tolist() == [0, 1, 2, 3]


def test_threads_record_and_replay_on_streams_of_one_device(device: CudaDevice) -> None:
    failures: list[BaseException] = []

    def work(value: int) -> None:
        try:
            stream = device.stream()
            for _ in range(10):
                source, target = (
                    placed(device, stream, np.full(9, v), "float32") for v in (value, 0)
                )
                (replay,) = stream.recorded(
                    [lambda source=source, target=target: stream.copy(source, target)]
                )
                replay()
                assert stream.download(target).tolist() == [value] * 9
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(value,)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_device_describes_itself(device: CudaDevice) -> None:
    described = device.describe()
    assert described["device"] == described["device"].strip()
    assert described["device"].isprintable()
    assert float(described["compute_capability"]) >= 5
    assert described["driver_cuda_version"] >= 12000


def test_the_last_device_of_the_machine_works_in_any_thread() -> None:
    index, found = int(load_driver().cuDeviceGetCount()) - 1, []
    device = cuda_device(index)
    stream = device.stream()
    buffer = placed(device, stream, np.arange(3), "float32")
    cuda_device(0).enter()

    def work() -> None:
        found.append(stream.download(buffer).tolist())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [[0, 1, 2]]
    assert device.describe()["device_index"] == index


def test_a_device_that_is_not_there_is_refused() -> None:
    count = int(load_driver().cuDeviceGetCount())
    with pytest.raises(
        EnvironmentUnsupportedError, match=f"no CUDA device {count + 3}; the driver finds {count}"
    ):
        cuda_device(count + 3)
