from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

import goc_deploy
from goc_deploy.engine_dir.graph_check import ExternalTensor, check_graph, external_tensors
from goc_deploy.engine_dir.onnx_messages import SCHEMA
from goc_deploy.engine_dir.reading import read_manifest
from goc_deploy.errors import EngineDirError, GocError, SafetyError
from tests.conftest import Command
from tests.engines.directories import with_graph

node = helper.make_node
FINAL = "onnx/final.onnx"
WEIGHT = {"w": ExternalTensor("unit.weights", (4,))}


def model(*nodes: NodeProto, initializers: tuple[TensorProto, ...] = ()) -> ModelProto:
    """Nodes between ``a`` and ``b``, on a weight ``w`` that lies outside."""
    a, b = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in "ab")
    graph = helper.make_graph(
        [*nodes, node("Add", ["a", "w"], ["b"])], "g", [a], [b], [outside(), *initializers]
    )
    return helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("goc", 1)],
        ir_version=10,
    )


def outside(
    name: str = "w", location: str = "unit.weights", dims: tuple[int, ...] = (4,)
) -> TensorProto:
    tensor = TensorProto(name=name, data_type=1, dims=dims, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", "0"), ("length", "16")):
        tensor.external_data.add(key=key, value=value)
    return tensor


def check(found: ModelProto | bytes) -> None:
    check_graph(found if isinstance(found, bytes) else found.SerializeToString(), WEIGHT, "x.onnx")


def add(found: NodeProto, *initializers: TensorProto) -> Callable[[ModelProto], object]:
    return lambda model: (
        model.graph.node.append(found),
        model.graph.initializer.extend(initializers),
    )


def move(location: str) -> Callable[[ModelProto], object]:
    return lambda found: found.graph.initializer[0].CopyFrom(outside(location=location))


def claim(**fields: Any) -> Callable[[ModelProto], object]:
    return lambda found: found.graph.initializer.append(TensorProto(name="t", **fields))


def define(*functions: tuple[str, str, NodeProto]) -> Callable[[ModelProto], object]:
    """Add functions: domain, name, and the node that is the body."""
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("goc", 1)]
    made = [
        helper.make_function(domain, name, ["x"], ["y"], [body], opsets)
        for domain, name, body in functions
    ]
    return lambda found: found.functions.extend(made)


def subgraph() -> onnx.GraphProto:
    out = helper.make_tensor_value_info("c", TensorProto.FLOAT, None)
    return helper.make_graph([node("Identity", ["a"], ["c"])], "sub", [], [out])


NEGATE = node("Neg", ["x"], ["y"])

REFUSED: dict[str, tuple[Callable[[ModelProto], object], type[GocError], str]] = {
    "a file of the system": (lambda m: m.graph.initializer.append(outside("p", "etc/passwd")),
        SafetyError, "etc/passwd"),
    "the expected name elsewhere": (move("../unit.weights"), SafetyError, "unit.weights"),
    "memory at an address": (move("*/_ORT_MEM_ADDR_/*"), SafetyError, "_ORT_MEM_ADDR_"),
    "a place without saying so": (lambda m: m.graph.initializer[0].ClearField("data_location"),
        SafetyError, "'w'"),
    "a place of an unknown kind": (
        lambda m: m.graph.initializer[0].external_data.add(key="x", value="y"),
        SafetyError, "'w'"),
    "two places": (
        lambda m: m.graph.initializer[0].external_data.add(key="location", value="unit.weights"),
        SafetyError, "'w'"),
    "a constant outside": (add(node("Constant", [], ["c"], value=outside())), SafetyError, "'w'"),
    "the weight of another shape": (lambda m: m.graph.initializer[0].dims.append(2),
        EngineDirError, r"\[4, 2\] but the manifest says \[4\]"),
    "one name twice": (lambda m: m.graph.initializer.append(outside()),
        EngineDirError, "two initializers"),
    "a loop": (add(node("Loop", ["", "", "a"], ["c"], body=subgraph())),
        EngineDirError, "subgraph"),
    "a condition": (add(node("If", ["a"], ["c"], then_branch=subgraph(), else_branch=subgraph())),
        EngineDirError, "subgraph"),
    "a sparse tensor": (lambda m: m.graph.sparse_initializer.add(),
        EngineDirError, "subgraph or another part"),
    "a bomb": (add(node("ConstantOfShape", ["a"], ["c"])),
        EngineDirError, "ai.onnx::ConstantOfShape"),
    "noise": (add(node("RandomNormalLike", ["a"], ["c"])), EngineDirError, "RandomNormalLike"),
    "another domain": (add(node("FusedMatMul", ["a", "a"], ["c"], domain="com.microsoft")),
        EngineDirError, "com.microsoft::FusedMatMul"),
    "an import of another domain": (lambda m: m.opset_import.add(domain="com.microsoft", version=1),
        EngineDirError, "com.microsoft"),
    "a function that is not there": (add(node("GocNothing", ["a"], ["c"], domain="goc")),
        EngineDirError, "goc::GocNothing"),
    "a function with an operator": (define(("goc", "GocX", node("Range", ["x", "x", "x"], ["y"]))),
        EngineDirError, "Range"),
    "functions in functions": (
        define(("goc", "GocX", NEGATE), ("goc", "GocY", node("GocX", ["x"], ["y"], domain="goc"))),
        EngineDirError, "GocX"),
    "a function in place of an operator": (define(("", "Add", NEGATE)),
        EngineDirError, "defines function ::Add"),
    "a function twice": (define(("goc", "GocX", NEGATE), ("goc", "GocX", NEGATE)),
        EngineDirError, "twice"),
    "a reference to an attribute": (
        lambda m: m.graph.node[0].attribute.add(name="axis", ref_attr_name="axis"),
        EngineDirError, "another part"),
    "an expansion by number": (
        add(node("Expand", ["a", "s"], ["c"]), numpy_helper.from_array(np.array([2**40]), "s")),
        EngineDirError, "expands"),
    "an expansion without a shape": (add(node("Expand", ["a"], ["c"])), EngineDirError, "expands"),
    "a large scale": (
        add(node("Resize", ["a", "", "s"], ["c"]),
            numpy_helper.from_array(np.float32([1, 1e5]), "s")),
        EngineDirError, "as large"),
    "a scale from outside": (add(node("Resize", ["a", "", "w"], ["c"])),
        EngineDirError, "as large"),
    "a size": (add(node("Resize", ["a", "", "", "a"], ["c"])), EngineDirError, "as large"),
    "padding": (add(node("Conv", ["a", "a"], ["c"], pads=[0, 0, 2**30, 0])),
        EngineDirError, "pads"),
    "a tensor that is not there": (claim(data_type=1, dims=[2**20, 2**20]),
        EngineDirError, "shape"),
    "a tensor that claims more than the file": (claim(data_type=1, dims=[2**16]),
        EngineDirError, "claims 65536"),
    "a negative size": (claim(data_type=1, dims=[-1]), EngineDirError, r"\[-1\]"),
    "strings": (claim(data_type=8, dims=[1]), EngineDirError, "element type 8"),
    "settings of ONNX Runtime": (lambda m: m.metadata_props.add(key="ort_config", value="{}"),
        EngineDirError, "another part"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_graph_with_more_than_ours_have_is_refused(name: str) -> None:
    change, kind, message = REFUSED[name]
    found = model()
    check(found)
    change(found)
    with pytest.raises(kind, match=message):
        check(found)


def test_other_formats_are_refused() -> None:
    polyglot = ModelProto(
        producer_name="xxORTM" + "x" * 100
    )  # ONNX Runtime takes this for its own format
    content = polyglot.SerializeToString()
    assert content[4:8] == b"ORTM"
    for bad in (b"\xff", content, b"PK\x03\x04", model().SerializeToString()[:-3]):
        with pytest.raises(EngineDirError):
            check(bad)


def test_names_are_numbers_of_onnx() -> None:
    nested = {"Tensor": onnx.TypeProto.Tensor, "Dimension": onnx.TensorShapeProto.Dimension}
    for message, fields in SCHEMA.items():
        known = nested.get(message, getattr(onnx, message, None)).DESCRIPTOR.fields_by_name
        for name, (number, kind) in fields.items():
            assert known[name].number == number
            if known[name].message_type is not None:
                assert known[name].message_type.name == kind.removesuffix("*")


def test_every_graph_of_an_export_passes(golden_engine: Path) -> None:
    manifest = read_manifest(golden_engine)
    for unit in manifest.all_graphs():
        check_graph(
            (golden_engine / unit.onnx).read_bytes(),
            external_tensors(manifest.parts(unit)),
            unit.onnx,
        )


def test_a_listed_graph_reads_no_file_of_the_working_directory(
    golden_engine: Path, command: Command, tmp_path: Path
) -> None:
    directory = tmp_path / "engine"
    shutil.copytree(golden_engine, directory)
    secret = tmp_path / "secret"
    secret.write_bytes(b"12345678" * 1000)
    found = onnx.load(directory / FINAL, load_external_data=False)
    stolen = outside("stolen", "secret", (2000,))
    found.graph.initializer.append(stolen)
    found.graph.node.append(node("ReduceMean", ["stolen"], ["stolen_mean"], keepdims=0))
    with_graph(directory, FINAL, found.SerializeToString())
    done = command("goc-run", directory, "--labels", 1, code=9, cwd=tmp_path)
    assert "final.onnx asks for the values of 'stolen' from 'secret'" in done.stderr
    with pytest.raises(SafetyError, match="do not use this directory"):
        goc_deploy.load(directory)
