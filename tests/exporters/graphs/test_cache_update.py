from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from goc_deploy.compiler import Predict, Prediction
from goc_deploy.compiler.cache_ops import updates_from_signature
from goc_deploy.engines.ort import OrtBackend
from goc_deploy.exporters.graphs.cache_update import predict_graph
from goc_deploy.spec import ModelSpec

SPEC = ModelSpec(2, 8, 2, 16, 2, 2, 4, 10, False)


def run(
    signature: str,
    precision: str,
    x: np.ndarray,
    gates: np.ndarray,
    coefficients: list[float],
    history: list[list[np.ndarray]],
) -> list[np.ndarray]:
    """x_out, then the stored predictions.

    Every stored prediction is written over the last entry that it reads.
    """
    backend = OrtBackend()
    engine = backend.load(
        memoryview(predict_graph(signature, SPEC, precision).SerializeToString()), {}
    )
    inputs, outputs = {}, {}
    for name, values in {
        "x": x,
        "gates": gates,
        "coefficients": np.array(coefficients, np.float32),
    }.items():
        inputs[name] = backend.allocate(values.shape, engine.dtypes[name])
        backend.upload(values, inputs[name])
    outputs["x_out"] = backend.allocate(x.shape, engine.dtypes["x_out"])
    for u, (entries, stored) in enumerate(updates_from_signature(signature)):
        for i in range(entries):
            inputs[f"g{u}_{i}"] = backend.allocate(x.shape, engine.dtypes["x"])
            backend.upload(history[u][i], inputs[f"g{u}_{i}"])
        if stored:
            outputs[f"g{u}"] = inputs[f"g{u}_{entries - 1}"]
    engine.bind(inputs, outputs)()
    return [backend.download(buffer) for buffer in outputs.values()]


@settings(max_examples=25)
@given(
    st.lists(st.tuples(st.integers(1, 4), st.booleans()), min_size=1, max_size=5),
    st.integers(1, 3),
    st.sampled_from(["fp32", "fp16"]),
    st.integers(0, 2**32 - 1),
)
def test_a_launch_adds_gated_predictions_and_stores_them_in_place(
    units: list[tuple[int, bool]], batch: int, precision: str, seed: int
) -> None:
    signature = Predict(
        0, tuple(Prediction((0,) * k, (1.0,) * k, 0 if w else None) for k, w in units)
    ).signature
    assert updates_from_signature(signature) == units
    dtype, tolerance = (np.float32, 1e-5) if precision == "fp32" else (np.float16, 4e-3)
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((batch, SPEC.tokens, SPEC.hidden)).astype(dtype)
    gates = rng.standard_normal((len(units), batch, SPEC.hidden)).astype(dtype)
    history = [[rng.standard_normal(x.shape).astype(dtype) for _ in range(k)] for k, _ in units]
    rows = [rng.uniform(-2, 2, k).astype(np.float32) for k, _ in units]
    expected, stored = x.astype(np.float64), []
    for u, (_, store) in enumerate(units):
        whole, *others = rows[u]
        g = history[u][0] + sum(
            c * h.astype(np.float64) for c, h in zip(others, history[u][1:], strict=True)
        )
        expected = expected + whole * gates[u].astype(np.float64)[:, None] * g
        if store:
            stored.append(g)
    found = run(signature, precision, x, gates, [float(c) for row in rows for c in row], history)
    for f, e in zip(found, [expected, *stored], strict=True):
        np.testing.assert_allclose(f, e, rtol=tolerance, atol=tolerance * 10)


def test_every_update_is_a_node_with_a_body_and_the_attributes_tensorrt_looks_for() -> None:
    model = predict_graph("1*2 2w*1", SPEC, "fp16")
    assert [f.name for f in model.functions] == ["GocCacheApply1", "GocCacheUpdate2"]
    updates = [node for node in model.graph.node if node.domain == "goc"]
    assert [node.op_type for node in updates] == [
        "GocCacheApply1",
        "GocCacheApply1",
        "GocCacheUpdate2",
    ]
    for node in updates:
        attributes = {a.name: a.s for a in node.attribute}
        assert attributes == {"plugin_namespace": b"goc", "plugin_version": b"1"}


def test_the_arithmetic_is_float32_in_every_precision() -> None:
    for function in predict_graph("2w*1 1*1", SPEC, "bf16").functions:
        casts = [node for node in function.node if node.op_type == "Cast"]
        assert {node.input[0] for node in casts} >= {"x", "gate", "g0"}
        assert {onnx.helper.get_node_attr_value(node, "to") for node in casts} == {
            onnx.TensorProto.FLOAT
        }


@pytest.mark.parametrize(
    ("signature", "big_passes"), [("1*8", 2), ("2*8", 4), ("2w*8", 4), ("4w*8", 8)]
)
def test_onnx_runtime_makes_no_more_passes_over_features_than_needed(
    signature: str, big_passes: int, tmp_path: Path
) -> None:
    options = onnxruntime.SessionOptions()
    options.use_per_session_threads = False
    options.log_severity_level = 4
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    OrtBackend()
    model = predict_graph(signature, SPEC, "fp32")
    onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    found = onnx.load(tmp_path / "optimised.onnx").graph.node
    assert not [node for node in found if node.op_type in ("Cast", "CastLike")]
    assert sum(node.op_type in ("Mul", "Add") for node in found) == 8 * (
        big_passes + 1
    )  # one on the gate
