from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from goc_deploy.compiler import Accumulate, Tap
from goc_deploy.compiler.cache_ops import taps_from_signature
from goc_deploy.engines.ort import OrtBackend
from goc_deploy.errors import EngineDirError
from goc_deploy.exporters.graphs.accumulate import graph_of_launch
from goc_deploy.exporters.graphs.cache_update import predict_graph
from goc_deploy.spec import ModelSpec

SPEC = ModelSpec(2, 8, 2, 16, 2, 2, 4, 10, False)


@settings(max_examples=25)
@given(
    st.lists(st.booleans(), min_size=1, max_size=4).map(sorted),
    st.integers(1, 3),
    st.sampled_from(["fp32", "fp16"]),
    st.integers(0, 2**32 - 1),
)
def test_a_launch_adds_a_gated_feature_to_every_accumulator_in_place(
    starts: list[bool], batch: int, precision: str, seed: int
) -> None:
    signature = Accumulate(0, 0, tuple(Tap(0, 1, 1.0, start) for start in starts)).signature
    assert taps_from_signature(signature) == starts
    dtype, tolerance = (np.float32, 1e-6) if precision == "fp32" else (np.float16, 2e-3)
    rng = np.random.default_rng(seed)
    shape, backend = (batch, SPEC.tokens, SPEC.hidden), OrtBackend()
    g = rng.standard_normal(shape).astype(dtype)
    gates = rng.standard_normal((len(starts), batch, SPEC.hidden)).astype(dtype)
    before = rng.standard_normal((len(starts), *shape)).astype(dtype)
    weights = rng.uniform(-2, 2, len(starts)).astype(np.float32)
    graph = graph_of_launch(signature, SPEC, precision).SerializeToString()
    engine = backend.load(memoryview(graph), {})

    values = {"g": g, "coefficients": weights}
    values |= {f"gate{tap}": gate for tap, gate in enumerate(gates)}
    values |= {f"a{tap}": before[tap] for tap, start in enumerate(starts) if not start}
    assert engine.dtypes.keys() == values.keys() | {f"a{tap}_out" for tap in range(len(starts))}
    inputs = {name: backend.allocate(v.shape, engine.dtypes[name]) for name, v in values.items()}
    for name, buffer in inputs.items():
        backend.upload(values[name], buffer)
    outputs = {
        f"a{tap}_out": inputs.get(f"a{tap}") or backend.allocate(shape, engine.dtypes["g"])
        for tap in range(len(starts))
    }
    engine.bind(inputs, outputs)()
    for tap, start in enumerate(starts):
        product = weights[tap] * gates[tap].astype(np.float64)[:, None] * g
        expected = product + (0 if start else before[tap].astype(np.float64))
        found = backend.download(outputs[f"a{tap}_out"])
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=8 * tolerance)


def test_a_signature_selects_the_kind_of_graph() -> None:
    assert graph_of_launch("2w*3 1*1", SPEC, "fp32") == predict_graph("2w*3 1*1", SPEC, "fp32")
    assert graph_of_launch("a*1 s*1", SPEC, "fp32").graph.name == "accumulate"
    for other in ("", "a*0", "s*1 a*1", "a*2 ", " s*1", "a*2s*1", "a*12"):
        assert taps_from_signature(other) is None
        with pytest.raises(EngineDirError, match="is not a predict signature"):
            graph_of_launch(other, SPEC, "fp32")
