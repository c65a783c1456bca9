"""TensorRT engines bound to addresses, on the stand-ins."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256

import numpy as np
import pytest
from onnx import TensorProto, helper

from goc_deploy.engines.tensorrt.backend import TensorrtBackend
from goc_deploy.engines.tensorrt.engine import StoredEngine, TensorrtEngine
from goc_deploy.engines.tensorrt.library import message_log
from goc_deploy.errors import EngineDirError, EnvironmentUnsupportedError, ResourceError
from goc_deploy.protocols import ALIGNMENT, bfloat16_from_float32, mapped_buffer, stored_values
from tests.stand_ins.device import StandInDevice
from tests.stand_ins.kernels import Fault
from tests.stand_ins.tensorrt import StandInTensorrt, with_profiles
from tests.stand_ins.tensorrt_context import Severity


def product() -> bytes:
    """``c = a @ w``, and ``d = a + a`` that nobody may want; w is a weight that is an input."""
    shapes = {"a": ["batch", 4], "w": [4, 4], "c": ["batch", 4], "d": ["batch", 4]}
    values = {
        name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in shapes.items()
    }
    nodes = [
        helper.make_node("MatMul", ["a", "w"], ["c"]),
        helper.make_node("Add", ["a", "a"], ["d"]),
    ]
    graph = helper.make_graph(nodes, "g", [values["a"], values["w"]], [values["c"], values["d"]])
    opset = [helper.make_opsetid("", 20)]
    return bytes(helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString())


ONNX = memoryview(product())
PROFILES = [{"a": ((1, 4), (usual, 4), (32, 4))} for usual in (2, 32)]
WEIGHTS = np.arange(16, dtype=np.float32).reshape(4, 4)


@pytest.fixture
def tensorrt() -> StandInTensorrt:
    return StandInTensorrt(StandInDevice())


@pytest.fixture
def backend(tensorrt: StandInTensorrt) -> TensorrtBackend:
    stored = StoredEngine(
        "here.engine", memoryview(b"vtrt" + bytes(ONNX)), uses_plugin=False, reads_first=False
    )
    engines = {sha256(ONNX).hexdigest(): stored}
    return TensorrtBackend(tensorrt.library, tensorrt.device, engines)


def load(backend: TensorrtBackend, weights: np.ndarray = WEIGHTS) -> TensorrtEngine:
    return backend.load(ONNX, {"w": mapped_buffer(weights.data.cast("B"), 0, (4, 4), "float32")})


def test_weights_are_uploaded_once_and_outputs_that_nobody_wants_go_elsewhere(
    backend: TensorrtBackend,
) -> None:
    engine, stream = load(backend), backend.device.stream()
    a, c = backend.allocate((2, 4), "float32"), backend.allocate((2, 4), "float32")
    stream.upload(np.ones((2, 4)), a)
    run = engine.bind({"a": a}, {"c": c}, stream)
    for _ in range(2):
        run()
        np.testing.assert_array_equal(stream.download(c), np.ones((2, 4)) @ WEIGHTS)


def test_addresses_shapes_and_names_that_do_not_fit_are_refused(backend: TensorrtBackend) -> None:
    engine, memory = load(backend), backend.allocate((4, 4), "float32")
    fits = memory.view(2, 4)
    for inputs, outputs, error, message in (
        (
            {"a": memory.view(2, 4, start=4)},
            {"c": fits},
            EnvironmentUnsupportedError,
            "no multiple of 256",
        ),
        (
            {"a": memory.view(8, 2)},
            {"c": fits},
            EngineDirError,
            r"does not take a of shape \[8, 2\]",
        ),
        ({"a": fits}, {"c": memory}, EngineDirError, r"has tensor 'c' as float32 \[2, 4\]"),
        ({"b": fits}, {"c": fits}, EngineDirError, "has tensor 'b' as None"),
        ({"c": fits}, {"a": fits}, EngineDirError, "has tensor 'c'"),
        ({}, {"c": fits}, EngineDirError, "input 'a' that nobody binds"),
        (
            {"a": backend.allocate((2, 4), "float16")},
            {"c": fits},
            EngineDirError,
            "implies float16",
        ),
    ):
        with pytest.raises(error, match=message):
            engine.bind(inputs, outputs)
    assert memory.pointer % ALIGNMENT == 0


def test_a_graph_without_an_engine_and_bytes_that_do_not_load_are_refused(
    tensorrt: StandInTensorrt, backend: TensorrtBackend
) -> None:
    with pytest.raises(EngineDirError, match="tensorrt-rtx has no engine for this graph"):
        backend.load(memoryview(b"another graph"), {})
    tensorrt.failures = {"deserialize_cuda_engine": []}
    with pytest.raises(
        EnvironmentUnsupportedError,
        match=r"tensorrt-rtx 99.1 does not load here.engine: .* no reason",
    ):
        load(backend)


def test_a_context_must_have_run_with_its_shapes_before_it_is_captured(
    backend: TensorrtBackend,
) -> None:
    engine, stream = load(backend), backend.device.stream()
    a, c = backend.allocate((2, 4), "float32"), backend.allocate((2, 4), "float32")
    stream.upload(np.ones((2, 4)), a)
    run = engine.bind({"a": a}, {"c": c}, stream)
    with pytest.raises(Fault, match="captured before it ran once"):
        stream.recorded([run])
    run()
    (replay,) = stream.recorded([run])
    other = engine.bind({"a": a.view(1, 4)}, {"c": c.view(1, 4)}, stream)  # a context of its own
    other()
    replay()
    np.testing.assert_array_equal(stream.download(c), np.ones((2, 4)) @ WEIGHTS)


def test_engines_on_the_stream_of_the_backend_are_for_one_thread_at_a_time(
    backend: TensorrtBackend,
) -> None:
    engine = load(backend)
    ones, found, kept = np.ones((2, 4), np.float32), {}, []
    with ThreadPoolExecutor(1) as other:

        def encode(value: int) -> None:
            a, found[value] = (
                backend.allocate((2, 4), "float32"),
                backend.allocate((2, 4), "float32"),
            )
            backend.upload(value * ones, a)
            kept.append(engine.bind({"a": a}, {"c": found[value]}))
            kept[-1]()

        encode(1)  # and nobody waits for it
        other.submit(encode, 2).result()
        other.submit(encode, 3).result()
        np.testing.assert_array_equal(backend.download(found[1]), ones @ WEIGHTS)
        encode(4)
        values = other.submit(backend.download, found[4]).result()
        np.testing.assert_array_equal(values, 4 * ones @ WEIGHTS)
        encode(5)
        other.submit(load, backend, 2 * WEIGHTS).result()
        for run in kept[:2]:
            other.submit(run).result()
            run()
        np.testing.assert_array_equal(backend.download(found[2]), 2 * ones @ WEIGHTS)


ALLOCATION = "[defaultAllocator.cpp::allocate::31] Error Code 1: Cuda Runtime (out of memory)"
# As TensorRT 8.6 to 10 log it: NVIDIA/TensorRT issues 3017 and 4258, open-mmlab/Live2Diff issue 9.
OUT_OF_MEMORY = [
    (Severity.ERROR, ALLOCATION),
    (
        Severity.WARNING,
        "Requested amount of GPU memory (17920000000 bytes) could not be allocated.",
    ),
    (
        Severity.ERROR,
        (
            "[executionContext.cpp::ExecutionContext::470] Error Code 2: OutOfMemory "
            "(no further information)"
        ),
    ),
]
FAULT = [(Severity.ERROR, "Error Code 1: Cuda Runtime (an illegal memory access was encountered)")]


@pytest.mark.parametrize(
    "call",
    ["deserialize_cuda_engine", "create_execution_context", "set_input_shape", "execute_async_v3"],
)
def test_too_little_memory_is_named_as_such_and_other_failures_are_not(
    backend: TensorrtBackend, tensorrt: StandInTensorrt, call: str
) -> None:
    def run() -> None:
        engine, stream = load(backend), backend.device.stream()
        a, c = backend.allocate((2, 4), "float32"), backend.allocate((2, 4), "float32")
        stream.upload(np.ones((2, 4)), a)
        engine.bind({"a": a}, {"c": c}, stream)()
        stream.wait()

    tensorrt.failures = {call: OUT_OF_MEMORY}
    with pytest.raises(
        ResourceError,
        match=r"here.engine.*not enough GPU memory .*17920000000 bytes.*smaller batch",
    ):
        run()
    tensorrt.failures = {call: FAULT}  # what was logged before does not count
    with pytest.raises(EnvironmentUnsupportedError, match=r"here.engine.*an illegal memory access"):
        run()
    tensorrt.failures = {call: []}
    with pytest.raises(
        (EnvironmentUnsupportedError, EngineDirError), match=r"here.engine.*no reason"
    ):
        run()
    tensorrt.failures = {}
    run()


@pytest.fixture
def two_profiles() -> TensorrtBackend:
    tensorrt = StandInTensorrt(StandInDevice(), "tensorrt")
    stored = StoredEngine(
        "here.engine", memoryview(with_profiles(bytes(ONNX), PROFILES)), False, reads_first=False
    )
    return TensorrtBackend(tensorrt.library, tensorrt.device, {sha256(ONNX).hexdigest(): stored})


def test_a_context_takes_the_profile_of_the_nearest_size(two_profiles: TensorrtBackend) -> None:
    backend, tensorrt = two_profiles, two_profiles.library.trt
    engine, stream = load(backend), backend.device.stream()
    for rows in (1, 2, 7, 9, 32):
        a, c = backend.allocate((rows, 4), "float32"), backend.allocate((rows, 4), "float32")
        stream.upload(np.ones((rows, 4)), a)
        engine.bind({"a": a}, {"c": c}, stream)()
        np.testing.assert_array_equal(stream.download(c), np.ones((rows, 4)) @ WEIGHTS)
    assert tensorrt.profiles_used == [0, 0, 0, 1, 1]
    with pytest.raises(
        EngineDirError, match=r"does not take a of shape \[33, 4\].* outside of profile 1"
    ):
        engine.bind({"a": backend.allocate((33, 4), "float32")}, {}, stream)


def test_a_profile_is_chosen_before_shapes_and_on_the_stream_of_the_runs(
    two_profiles: TensorrtBackend,
) -> None:
    load(two_profiles)  # and with it the scratch memory
    stream, other = two_profiles.device.stream(), two_profiles.device.stream()
    trt = two_profiles.library.trt
    content = with_profiles(bytes(ONNX), PROFILES)
    deserialized = trt.Runtime(message_log(trt)).deserialize_cuda_engine(content)
    context = two_profiles.library.new_context(deserialized)
    with pytest.raises(Fault, match="several profiles, and none was chosen before the shape of a"):
        context.set_input_shape("a", (2, 4))
    assert context.set_optimization_profile_async(1, other.handle)
    context.set_device_memory(
        two_profiles.lane(stream).scratch.pointer, two_profiles.lane(stream).scratch.nbytes
    )
    with pytest.raises(Fault, match="its profile was chosen on another stream"):
        context.execute_async_v3(stream.handle)


def test_values_are_stored_as_their_dtype_says() -> None:
    values = np.array([1.0, -2.5, 3.1415927, 1e-40], np.float32)
    bits = bfloat16_from_float32(values)
    assert bits.tolist()[:3] == [0x3F80, 0xC020, 0x4049]
    assert stored_values(bits, "bfloat16") is bits
    assert stored_values(values, "float16").dtype == np.float16
