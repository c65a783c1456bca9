"""What the machine can do at best, measured, and what a step needs, counted."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime
import torch
from onnx import TensorProto, helper

from goc_deploy.engines.ort import shared_pool_of_process
from goc_deploy.spec import ModelSpec

SQUARES = (2048, 4096)
COPY_BYTES = 2**28


def measured_peaks(spec: ModelSpec, rows: int, threads: int, repeats: int = 10) -> dict[str, Any]:
    """The fastest matrix product over libraries and shapes, and memory traffic.

    Returns:
        ``sgemm_gflops`` of the best, ``sgemm`` by library and shape (m, k, n), ``copy_gb_s``
        (bytes read plus bytes written), ``read_gb_s``. Every figure is the best of
        ``repeats`` runs.
    """
    m, d, h = rows * spec.tokens, spec.hidden, spec.mlp_hidden
    shapes = [(m, d, 3 * d), (m, d, d), (m, d, h), (m, h, d), *((s, s, s) for s in SQUARES)]
    found: dict[str, float] = {}
    for shape in shapes:
        a, b = (
            np.random.rand(*shape[:2]).astype(np.float32),
            np.random.rand(*shape[1:]).astype(np.float32),
        )
        torch_a, torch_b = torch.from_numpy(a), torch.from_numpy(b)
        session = _matmul_session(b, threads)
        for library, run in (
            ("torch", lambda x=torch_a, y=torch_b: torch.mm(x, y)),
            ("numpy", lambda x=a, y=b: x @ y),
            ("onnxruntime", lambda x=a, s=session: s.run(None, {"a": x})),
        ):
            found[f"{library} {'x'.join(map(str, shape))}"] = (
                2 * np.prod(shape) / best_seconds(run, repeats) / 1e9
            )
    source, target = torch.ones(COPY_BYTES // 4), torch.empty(COPY_BYTES // 4)
    return {
        "sgemm_gflops": max(found.values()),
        "sgemm_best": max(found, key=lambda name: found[name]),
        "sgemm": found,
        "copy_gb_s": 2 * COPY_BYTES / best_seconds(lambda: target.copy_(source), repeats) / 1e9,
        "read_gb_s": COPY_BYTES / best_seconds(lambda: source.sum(), repeats) / 1e9,
    }


def best_seconds(run: Callable[[], object], repeats: int) -> float:
    """The fastest of some runs, after one that does not count."""
    run()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _matmul_session(b: np.ndarray, threads: int) -> onnxruntime.InferenceSession:
    """A product with a constant matrix, which ONNX Runtime packs."""
    value_info, rows = helper.make_tensor_value_info, b.shape[0]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["a", "b"], ["c"])],
        "matmul",
        [value_info("a", TensorProto.FLOAT, ["m", rows])],
        [value_info("c", TensorProto.FLOAT, ["m", b.shape[1]])],
        [helper.make_tensor("b", TensorProto.FLOAT, b.shape, b.tobytes(), raw=True)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    shared_pool_of_process(threads)
    options = onnxruntime.SessionOptions()
    options.use_per_session_threads = False
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
