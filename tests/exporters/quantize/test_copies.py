"""Quantised units: what they compute, how they are stored, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from goc_deploy.engine_dir.manifest import GraphEntry, Parameter
from goc_deploy.engine_dir.weights import mapped_weights
from goc_deploy.engines.ort import OrtBackend
from goc_deploy.errors import ModelError, VerificationError
from goc_deploy.exporters.architectures.dit import graph_kinds, spec_from_tensors
from goc_deploy.exporters.quantize.blocks import dequantized_blocks, quantized_blocks
from goc_deploy.exporters.quantize.copies import quantize_copy
from goc_deploy.exporters.quantize.products import products_of
from goc_deploy.exporters.unit_files import UnitWriter
from goc_deploy.options import no_progress
from goc_deploy.precision import DTYPE_OF_FORMAT, Precision, WeightFormat
from tests.conftest import GOLDEN

STATE = torch.load(GOLDEN / "model.pt", weights_only=True)
SPEC = spec_from_tensors(STATE, 4)
MLP = 3
NAME = "block_01_mlp"


def written(
    folder: Path, precision: Precision, weight_format: WeightFormat | None
) -> dict[str, GraphEntry]:
    formats = {} if weight_format is None else {NAME: [weight_format]}
    writer = UnitWriter(folder, OrtBackend(), no_progress, formats)
    kind = graph_kinds(SPEC, precision)[MLP]
    return {unit.name: unit for unit in writer.write([kind], STATE, precision)}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, GraphEntry]:
    folder = tmp_path_factory.mktemp("plain")
    return folder, written(folder, "fp32", None)[NAME]


@pytest.mark.parametrize("weight_format", ["w8", "w4"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_only_the_weights_of_the_chosen_unit_are_quantised(
    precision: Precision, weight_format: WeightFormat, tmp_path: Path
) -> None:
    units = written(tmp_path, precision, weight_format)
    unit, other = units[NAME], units["block_00_mlp"]
    assert (unit.weight_format, other.weight_format) == (weight_format, None)
    assert other.relative_l2 is not None
    assert unit.relative_l2 is not None
    assert other.relative_l2 < unit.relative_l2 < {"w8": 0.01, "w4": 0.15}[weight_format]
    dtypes = {p.name: unit.dtype(p) for p in unit.parameters}
    precise = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}[precision]
    quantised = {"w8": "int8", "w4": "int4"}[weight_format]
    assert dtypes == {
        "mlp.fc1.weight": quantised,
        "mlp.fc1.weight.scales": precise,
        "mlp.fc1.bias": precise,
        "mlp.fc2.weight": quantised,
        "mlp.fc2.weight.scales": precise,
        "mlp.fc2.bias": precise,
    }
    assert (tmp_path / str(unit.weights_file)).stat().st_size == unit.end(unit.parameters[-1])
    assert not list(tmp_path.rglob("*.tmp"))


def test_the_file_holds_the_integers_and_scales_of_the_checkpoint(
    tmp_path: Path, plain: tuple[Path, GraphEntry]
) -> None:
    unit = written(tmp_path, "fp32", "w8")[NAME]
    content = (tmp_path / str(unit.weights_file)).read_bytes()
    weight = STATE["blocks.1.mlp.fc1.weight"].float().numpy()
    integers, scales = quantized_blocks(np.ascontiguousarray(weight.T), "int8", "float32")
    stored, stored_scales = unit.parameters[:2]
    found = np.frombuffer(content, np.int8, integers.size, stored.offset).reshape(stored.shape)
    np.testing.assert_array_equal(found, integers)
    found_scales = np.frombuffer(content, np.float32, scales.size, stored_scales.offset)
    np.testing.assert_array_equal(found_scales.reshape(scales.shape), scales)
    graph = onnx.load(tmp_path / unit.onnx).graph
    read = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    np.testing.assert_array_equal(read["mlp.fc1.weight"], integers)
    folder, before = plain
    bias, old = (entry.parameters[-1] for entry in (unit, before))
    old_content = (folder / str(before.weights_file)).read_bytes()
    assert content[bias.offset :] == old_content[old.offset : before.end(old)]


@pytest.mark.parametrize(
    ("weight_format", "least", "most"),
    [("w8", 0.0, 1e-5), ("w4", 0.0, 1e-5), ("w8+dynamic", 1e-4, 0.01)],
)
def test_it_computes_what_the_full_graph_computes_with_the_values_of_the_integers(
    weight_format: WeightFormat, least: float, most: float, tmp_path: Path
) -> None:
    """Activations are rounded only if the format says so."""
    unit = written(tmp_path, "fp32", weight_format)[NAME]
    values = dict(STATE)
    for layer in ("fc1", "fc2"):
        weight = STATE[f"blocks.1.mlp.{layer}.weight"].float().numpy()
        pair = quantized_blocks(
            np.ascontiguousarray(weight.T), DTYPE_OF_FORMAT[weight_format], "float32"
        )
        values[f"blocks.1.mlp.{layer}.weight"] = torch.from_numpy(dequantized_blocks(*pair).T)
    full = tmp_path / "full"
    writer = UnitWriter(full, OrtBackend(), no_progress)
    (full / "onnx").mkdir(parents=True)
    reference = writer.write([graph_kinds(SPEC, "fp32")[MLP]], values, "fp32")[1]
    ours, theirs = (
        outputs(folder, entry) for folder, entry in ((tmp_path, unit), (full, reference))
    )
    for name, expected in theirs.items():
        error = np.linalg.norm(ours[name] - expected) / np.linalg.norm(expected)
        assert least <= error < most, name


def outputs(folder: Path, unit: GraphEntry) -> dict[str, np.ndarray]:
    backend, rng = OrtBackend(), np.random.default_rng(0)
    graph = memoryview((folder / unit.onnx).read_bytes())
    weights = memoryview((folder / str(unit.weights_file)).read_bytes())
    engine = backend.load(graph, *mapped_weights(unit, weights))
    rows, tokens, hidden = 2, SPEC.tokens, SPEC.hidden
    inputs = {}
    for name in ("x", "shift", "scale", "gate"):
        shape = (rows, tokens, hidden) if name == "x" else (rows, hidden)
        inputs[name] = backend.allocate(shape, "float32")
        backend.upload(rng.standard_normal(shape, dtype=np.float32), inputs[name])
    results = {
        "x_out": backend.allocate((rows, tokens, hidden), "float32"),
        "feature": backend.allocate((rows * tokens, hidden), "float32"),
    }
    engine.bind(inputs, results)()
    return {name: backend.download(buffer) for name, buffer in results.items()}


def test_a_weight_that_is_not_finite_is_named(
    tmp_path: Path, plain: tuple[Path, GraphEntry]
) -> None:
    source, unit = plain
    for file in (source / "onnx").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    values = np.fromfile(tmp_path / f"{NAME}.weights", np.float32)
    values[7] = np.nan
    values.tofile(tmp_path / f"{NAME}.weights")
    with pytest.raises(ModelError, match=r"mlp.fc1.weight: a weight to be quantised is infinite"):
        quantize_copy(tmp_path, NAME, unit.parameters, "fp32", "w8")


def test_a_unit_without_such_products_is_named(tmp_path: Path) -> None:
    model = graph_of(helper.make_node("Relu", ["x"], ["y"]))
    onnx.save_model(model, tmp_path / "unit.onnx")
    with pytest.raises(ModelError, match=r"unit unit has no matrix product.*quantize_exclude=unit"):
        quantize_copy(tmp_path, "unit", (), "fp32", "w8")


def test_an_error_beyond_tolerance_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def zeros(*args: object) -> tuple[np.ndarray, np.ndarray]:
        integers, scales = quantized_blocks(*args)  # type: ignore[arg-type]
        return integers * 0, scales

    monkeypatch.setattr("goc_deploy.exporters.quantize.copies.quantized_blocks", zeros)
    with pytest.raises(VerificationError, match=rf"unit {NAME}: weights in w8 change its outputs"):
        written(tmp_path, "fp32", "w8")


def weight(*dims: int) -> TensorProto:
    return TensorProto(name="w", data_type=1, dims=dims, data_location=TensorProto.EXTERNAL)


def graph_of(*nodes: onnx.NodeProto, initializer: TensorProto | None = None) -> onnx.ModelProto:
    x, y = (helper.make_tensor_value_info(name, 1, ["n", 64]) for name in "xy")
    initializers = [] if initializer is None else [initializer]
    graph = helper.make_graph(list(nodes), "g", [x], [y], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


GEMM = helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)


@pytest.mark.parametrize(
    ("node", "dims", "shape"),
    [
        (GEMM, (6, 64), (64, 6)),
        (helper.make_node("Gemm", ["x", "w"], ["y"]), (64, 6), (64, 6)),
        (helper.make_node("MatMul", ["x", "w"], ["y"]), (64, 6), (64, 6)),
        (GEMM, (6, 48), None),  # K is no multiple of a block
        (GEMM, (5, 64), None),  # two columns share a byte
        (helper.make_node("Gemm", ["x", "w"], ["y"], transB=1, alpha=2.0), (6, 64), None),
        (helper.make_node("Gemm", ["w", "x"], ["y"]), (64, 64), None),
        (helper.make_node("Add", ["x", "w"], ["y"]), (64, 64), None),
        (helper.make_node("MatMul", ["w", "w"], ["y"]), (64, 64), None),
    ],
)
def test_products_are_found_by_their_form(
    node: onnx.NodeProto, dims: tuple[int, ...], shape: tuple[int, int] | None
) -> None:
    found = products_of(graph_of(node, initializer=weight(*dims)))
    assert [product.shape for product in found] == ([] if shape is None else [shape])


def test_parameters_know_where_they_end() -> None:
    unit = GraphEntry("u", "u.onnx", "u.weights", (), False, None, "fp16")
    assert unit.end(Parameter("a", 10, (3, 5))) == 40
    assert unit.end(Parameter("a", 10, (3, 5), "int8")) == 25
    assert unit.end(Parameter("a", 10, (3, 5), "int4")) == 18
