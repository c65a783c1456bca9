from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.engine_dir.keys import dimension_ranges
from goc_deploy.engine_dir.manifest import GraphEntry, Manifest
from goc_deploy.engines.ort import OrtBackend
from goc_deploy.engines.tensorrt import graphs
from goc_deploy.errors import EngineDirError, ResourceError
from goc_deploy.protocols import mapped_buffer


def unit_of(engine: Path, name: str) -> tuple[Manifest, GraphEntry, memoryview, memoryview]:
    """Manifest, unit, and the bytes of its graph and weights."""
    directory = EngineDir.open(engine)
    unit = next(u for u in directory.manifest.graphs if u.name == name)
    assert unit.weights_file is not None
    return directory.manifest, unit, directory.read(unit.onnx), directory.read(unit.weights_file)


def run(graph: bytes, inputs: dict[str, np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    backend = OrtBackend()
    engine = backend.load(memoryview(graph), {})
    bound = {}
    for name, values in inputs.items():
        bound[name] = backend.allocate(values.shape, engine.dtypes[name])
        backend.upload(values, bound[name])
    out = backend.allocate(shape, engine.dtypes["x_out"])
    engine.bind(bound, {"x_out": out})()
    return backend.download(out)


def test_all_three_forms_of_a_unit_compute_the_same(golden_engine: Path) -> None:
    manifest, unit, content, weights = unit_of(golden_engine, "block_01_mlp")
    spec, rng = manifest.model, np.random.default_rng(0)
    inputs = {
        name: rng.standard_normal((2, spec.hidden), np.float32)
        for name in ("shift", "scale", "gate")
    }
    inputs["x"] = rng.standard_normal((2, spec.tokens, spec.hidden), np.float32)
    parameters = {
        p.name: mapped_buffer(weights, p.offset, p.shape, "float32") for p in unit.parameters
    }

    backend = OrtBackend()
    out = backend.allocate(inputs["x"].shape, "float32")
    bound = {name: backend.allocate(values.shape, "float32") for name, values in inputs.items()}
    for name, values in inputs.items():
        backend.upload(values, bound[name])
    backend.load(content, parameters).bind(bound, {"x_out": out})()
    expected = backend.download(out)

    embedded = graphs.model_from_bytes(content, "here")
    graphs.embed_weights(embedded, unit, weights, "here")
    assert not [i for i in embedded.graph.initializer if i.data_location == 1]
    np.testing.assert_array_equal(run(graphs.graph_bytes(embedded), inputs, out.shape), expected)

    shared = graphs.model_from_bytes(content, "here")
    graphs.share_weights(shared)
    as_inputs = {
        p.name: np.frombuffer(weights, np.float32, int(np.prod(p.shape)), p.offset).reshape(p.shape)
        for p in unit.parameters
    }
    np.testing.assert_allclose(
        run(graphs.graph_bytes(shared), {**inputs, **as_inputs}, out.shape),
        expected,
        rtol=1e-5,
        atol=1e-5,
    )


def test_units_of_a_kind_become_equal_and_keep_gemms_that_fuse(golden_engine: Path) -> None:
    forms = set()
    for block in range(4):
        model = graphs.model_from_bytes(
            unit_of(golden_engine, f"block_{block:02d}_attn")[2], "here"
        )
        graphs.share_weights(model)
        forms.add(graphs.graph_bytes(model))
        products = [node for node in model.graph.node if node.op_type == "Gemm"]
        assert [list(node.input[1:]) for node in products] == [
            ["attn.qkv.weight", "attn.qkv.bias"],
            ["attn.proj.weight", "attn.proj.bias"],
        ]
        assert all({a.name: a.i for a in node.attribute}["transB"] == 1 for node in products)
    assert len(forms) == 1


def test_dropping_places_of_weights_keeps_units_of_a_kind_equal(golden_engine: Path) -> None:
    forms = set()
    for block in range(4):
        model = graphs.model_from_bytes(unit_of(golden_engine, f"block_{block:02d}_mlp")[2], "here")
        graphs.drop_weight_places(model)
        forms.add(graphs.graph_bytes(model))
    assert len(forms) == 1


def test_every_dynamic_dimension_of_an_engine_has_a_range(golden_engine: Path) -> None:
    manifest, _, content, _ = unit_of(golden_engine, "conditioning")
    ranges = dimension_ranges(manifest.model, 3, 20)
    shapes, used = graphs.input_shapes(graphs.model_from_bytes(content, "here"), ranges, "here")
    assert shapes == {"timesteps": ((1,), (20,), (20,)), "labels": ((1,), (2,), (4,))}
    assert dict(used) == {"steps": (1, 20, 20), "labels": (1, 2, 4)}


def test_what_does_not_fit_is_refused(golden_engine: Path) -> None:
    _, unit, content, weights = unit_of(golden_engine, "block_00_attn")
    with pytest.raises(EngineDirError, match="here is not an ONNX graph"):
        graphs.model_from_bytes(memoryview(b"no graph"), "here")
    model = graphs.model_from_bytes(content, "here")
    with pytest.raises(EngineDirError, match=r"does not describe initializer attn.qkv.weight"):
        graphs.embed_weights(model, replace(unit, parameters=unit.parameters[1:]), weights, "here")
    huge = np.lib.stride_tricks.as_strided(np.zeros(1, np.uint8), (2**31,), (0,))
    with pytest.raises(
        ResourceError,
        match=r"2.1 GB of weights do not fit into one graph; "
        r"use `EngineOptions.weight_mode=shared`",
    ):
        graphs.embed_weights(model, unit, huge, "here")  # type: ignore[arg-type]
    with pytest.raises(EngineDirError, match="input x has the dynamic dimension 'batch'"):
        graphs.input_shapes(model, {}, "here")
    model.graph.input[0].type.tensor_type.shape.dim[0].Clear()
    with pytest.raises(EngineDirError, match="input x has a dimension without name or size"):
        graphs.input_shapes(model, {"batch": (1, 2, 2)}, "here")
