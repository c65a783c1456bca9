from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from goc_deploy.engines.ort import OrtBackend
from goc_deploy.errors import EngineDirError, EnvironmentUnsupportedError
from goc_deploy.protocols import ALIGNMENT


def graph(op: str, dtype: int = TensorProto.FLOAT, opset: int = 20) -> memoryview:
    values = [helper.make_tensor_value_info(name, dtype, ["n", 4]) for name in ("a", "b")]
    model = helper.make_model(
        helper.make_graph([helper.make_node(op, ["a"], ["b"])], "g", values[:1], values[1:]),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=10,
    )
    return memoryview(model.SerializeToString())


def test_tensors_are_read_and_written_at_their_addresses() -> None:
    backend = OrtBackend()
    memory = backend.allocate((16,), "float32")
    assert memory.pointer % ALIGNMENT == 0
    backend.upload(np.arange(16, dtype=np.float32), memory)
    run = backend.load(graph("Neg"), {}).bind(
        {"a": memory.view(2, 4)}, {"b": memory.view(2, 4, start=8)}
    )
    run()
    np.testing.assert_array_equal(backend.download(memory), [*range(8), *(-x for x in range(8))])


@pytest.mark.parametrize("dtype", ["float32", "float16", "int64"])
def test_upload_and_download_keep_values(dtype: str) -> None:
    backend, values = OrtBackend(), np.arange(6).reshape(2, 3)
    buffer = backend.allocate((2, 3), dtype)
    backend.upload(values, buffer)
    np.testing.assert_array_equal(backend.download(buffer), values)


def test_a_view_beyond_its_memory_is_our_bug() -> None:
    with pytest.raises(AssertionError):
        OrtBackend().allocate((4,), "float32").view(2, start=3)


def test_wrong_names_types_and_shapes_are_refused_when_bound() -> None:
    backend = OrtBackend()
    engine, good = backend.load(graph("Neg"), {}), backend.allocate((2, 4), "float32")
    for name, bad in (
        ("x", good),
        ("a", backend.allocate((2, 4), "float16")),
        ("a", good.view(4, 2)),
        ("a", good.view(8)),
    ):
        with pytest.raises(EngineDirError, match=f"tensor '{name}' as .* but the manifest implies"):
            engine.bind({name: bad}, {"b": good})


def test_bytes_that_are_no_graph_and_unknown_ops_are_refused() -> None:
    backend = OrtBackend()
    for bad in (
        memoryview(b"not a graph"),
        memoryview(b""),
        graph("NoSuchOperator"),
        graph("Neg", opset=999),
    ):
        with pytest.raises(EngineDirError, match="refuses a graph"):
            backend.load(bad, {})


def test_a_graph_without_a_cpu_kernel_says_what_to_do() -> None:
    with pytest.raises(
        EnvironmentUnsupportedError, match=r"has no CPU kernel .* export with `precision=fp32`"
    ):
        OrtBackend().load(graph("Floor", TensorProto.BFLOAT16), {})


def test_own_pools_are_refused_once_the_process_has_a_shared_one() -> None:
    OrtBackend()
    with pytest.raises(EnvironmentUnsupportedError, match="use it from the first load on"):
        OrtBackend(shared_pool=False)


OWN_POOLS = """
import sys, onnxruntime, numpy as np, goc_deploy
pipe = goc_deploy.load(sys.argv[1], shared_pool=False)
onnxruntime.InferenceSession(sys.argv[1] + "/onnx/sampler.onnx", providers=["CPUExecutionProvider"])
print(pipe.generate([1]).report["thread_pool"])
"""


def test_with_own_pools_the_program_may_make_other_sessions_as_it_likes(
    golden_engine: Path,
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", OWN_POOLS, str(golden_engine)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.strip() == "per unit", done.stderr


def test_the_pool_of_the_process_is_made_once(caplog: pytest.LogCaptureFixture) -> None:
    first = OrtBackend().describe()["threads"]
    assert OrtBackend(threads=7).describe()["threads"] == first
    assert "keeps its size" in caplog.text
