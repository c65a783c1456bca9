from __future__ import annotations

import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from goc_deploy.engines.ort import shared_pool_of_process
from goc_deploy.engines.ort_errors import LOADING, RUNNING, error_from_ort
from goc_deploy.errors import (
    EngineDirError,
    EnvironmentUnsupportedError,
    GocError,
    ResourceError,
    UsageError,
)


def session(
    op: str, dtype: int = TensorProto.FLOAT, source: int = TensorProto.FLOAT
) -> onnxruntime.InferenceSession:
    a, b = (
        helper.make_tensor_value_info("a", source, ["n"]),
        helper.make_tensor_value_info("b", dtype, None),
    )
    graph = helper.make_graph([helper.make_node(op, ["a"], ["b"])], "g", [a], [b])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    shared_pool_of_process(0)  # another test may have made it, and then a session needs to use it
    options = onnxruntime.SessionOptions()
    options.use_per_session_threads = False
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


@pytest.mark.parametrize(
    ("text", "kind", "advice"),
    [
        ("Exception during initialization: std::bad_alloc", ResourceError, "smaller batch size"),
        (
            "BFCArena: Failed to allocate memory for requested buffer of size 4294967296",
            ResourceError,
            "smaller batch",
        ),
        (
            "Available memory of 61711104 is smaller than requested bytes of 324000000",
            ResourceError,
            "free memory",
        ),
        (
            "CUDA failure 2: out of memory ; GPU=0 ; expr=cudaMalloc",
            ResourceError,
            "smaller batch size",
        ),
        (
            "CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED ; GPU=0",
            ResourceError,
            "smaller batch size",
        ),
        (
            "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
            ResourceError,
            "smaller batch size",
        ),
        ("open(/x) failed: Too many open files", ResourceError, "ulimit -n"),
        (
            "CUDA failure 700: an illegal memory access was encountered",
            EnvironmentUnsupportedError,
            "driver",
        ),
        ("CUDA failure 222: the provided PTX was compiled", EnvironmentUnsupportedError, "driver"),
        (
            "CUDNN failure 1000: CUDNN_STATUS_NOT_INITIALIZED ; GPU=0",
            EnvironmentUnsupportedError,
            "driver",
        ),
        (
            "CUBLAS failure 1: CUBLAS_STATUS_NOT_INITIALIZED ; GPU=0",
            EnvironmentUnsupportedError,
            "driver",
        ),
        (
            "[ONNXRuntimeError] : 11 : EP_FAIL : Non-zero status code",
            EnvironmentUnsupportedError,
            "driver",
        ),
        (
            "libcublasLt.so.12: cannot open shared object file",
            EnvironmentUnsupportedError,
            "libraries",
        ),
        (
            "[ONNXRuntimeError] : 9 : NOT_IMPLEMENTED : Floor(13)",
            EnvironmentUnsupportedError,
            "`precision=fp32`",
        ),
        (
            "[ONNXRuntimeError] : 10 : INVALID_GRAPH : CUDAExecutionProvider",
            EngineDirError,
            "export again",
        ),
        ("", EngineDirError, "export again"),
    ],
)
def test_what_onnx_runtime_writes_decides_the_class(
    text: str, kind: type[GocError], advice: str
) -> None:
    found = error_from_ort(RuntimeError(text), RUNNING)
    assert type(found) is kind
    assert advice in str(found)
    assert text[:60] in str(found)


def test_errors_of_python_and_of_ours_are_taken() -> None:
    assert type(error_from_ort(MemoryError(), LOADING)) is ResourceError
    damaged = UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
    assert type(error_from_ort(damaged, RUNNING)) is EngineDirError
    ours = UsageError("x")
    assert error_from_ort(ours, LOADING) is ours


def test_a_message_is_one_short_line_that_a_terminal_can_show() -> None:
    text = str(
        error_from_ort(RuntimeError("\x1b[31mred\x07 " + "x" * 5000 + "\nsecond line"), LOADING)
    )
    assert text.isprintable()
    assert len(text) < 500
    assert "second" not in text


def test_memory_that_a_run_cannot_have_is_told_from_a_broken_graph() -> None:
    bomb = session("ConstantOfShape", source=TensorProto.INT64)
    with pytest.raises(Exception, match="Failed to allocate") as full:
        bomb.run(None, {"a": np.array([2**46])})
    assert type(error_from_ort(full.value, RUNNING)) is ResourceError
    assert "Failed to allocate memory for requested buffer" in str(
        error_from_ort(full.value, RUNNING)
    )
    with pytest.raises(Exception, match="must be >= 0") as broken:
        bomb.run(None, {"a": np.array([-1])})
    assert type(error_from_ort(broken.value, RUNNING)) is EngineDirError


def test_a_kernel_that_is_missing_names_the_provider() -> None:
    with pytest.raises(Exception, match="NOT_IMPLEMENTED") as lacking:
        session("Floor", TensorProto.BFLOAT16, TensorProto.BFLOAT16)
    found = error_from_ort(lacking.value, LOADING, "CUDA")
    assert type(found) is EnvironmentUnsupportedError
    assert "has no CUDA kernel" in str(found)


ADDRESS_SPACE = """
import resource, sys, onnxruntime
from goc_deploy.engines.ort_errors import LOADING, error_from_ort
from onnx import helper, numpy_helper
import numpy as np
w = numpy_helper.from_array(np.zeros(2**24, np.float32), "w")
tensors = [helper.make_tensor_value_info(n, 1, [2**24]) for n in ("a", "b")]
nodes = [helper.make_node("Add", ["a", "w"], ["b"])]
graph = helper.make_graph(nodes, "g", tensors[:1], tensors[1:], [w])
opset = helper.make_opsetid("", 20)
content = helper.make_model(graph, opset_imports=[opset], ir_version=10).SerializeToString()
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**25, used + 2**25))
try:
    onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
except Exception as cause:
    sys.exit(error_from_ort(cause, LOADING).exit_code)
"""


def test_a_full_memory_at_load_is_no_corrupt_engine() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ADDRESS_SPACE], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 7, done.stderr


OUTER_PRODUCT = """
import sys
from onnx import helper
from goc_deploy.engines import ort
from goc_deploy.errors import ResourceError
ort.available_bytes = lambda: 2**26
shapes = {"a": ["n", 1], "b": [1, 1]}
tensors = [helper.make_tensor_value_info(name, 1, shape) for name, shape in shapes.items()]
nodes = [helper.make_node("Transpose", ["a"], ["t"], perm=[1, 0]),
         helper.make_node("Mul", ["a", "t"], ["m"]), helper.make_node("ReduceMean", ["m"], ["b"])]
graph = helper.make_graph(nodes, "g", tensors[:1], tensors[1:])
opset = helper.make_opsetid("", 20)
content = helper.make_model(graph, opset_imports=[opset], ir_version=10).SerializeToString()
backend = ort.OrtBackend(1)
engine, b = backend.load(memoryview(content), {}), backend.allocate((1, 1), "float32")
for side in (1000, 9000):
    try:
        engine.bind({"a": backend.allocate((side, 1), "float32")}, {"b": b})()
    except ResourceError as error:
        sys.exit(f"{side}: {error}")
"""


def test_a_graph_that_multiplies_its_inputs_out_is_stopped_at_the_memory_there_is() -> None:
    done = subprocess.run(
        [sys.executable, "-c", OUTER_PRODUCT], capture_output=True, text=True, timeout=120
    )
    assert "9000: ONNX Runtime" in done.stderr
    assert "because memory is full" in done.stderr
