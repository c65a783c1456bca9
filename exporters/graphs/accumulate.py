"""Graphs that add one computed feature to accumulators of later steps."""

from __future__ import annotations

from onnx import ModelProto, TensorProto, ValueInfoProto, helper

from goc_deploy.compiler.cache_ops import taps_from_signature
from goc_deploy.exporters.graphs.cache_update import checked_model, predict_graph, split
from goc_deploy.exporters.graphs.step import token_dimension
from goc_deploy.precision import DTYPE_OF_PRECISION, ELEMENT_TYPES, Precision
from goc_deploy.spec import ModelSpec


def graph_of_launch(signature: str, spec: ModelSpec, precision: Precision) -> ModelProto:
    """The graph of a launch that predicts or accumulates, by its signature.

    Raises:
        EngineDirError: it is neither signature.
    """
    taps = taps_from_signature(signature)
    if taps is None:
        return predict_graph(signature, spec, precision)
    return accumulate_graph(taps, spec, precision)


def accumulate_graph(starts: list[bool], spec: ModelSpec, precision: Precision) -> ModelProto:
    """The graph of a launch that adds one feature to accumulators: ``a += c * gate * g``.

    Sums are computed in float32. An accumulator may be read and written at the same address.

    Inputs: g (B, T, D), coefficients (taps,) float32, gate{tap} (B, D), and a{tap} (B, T, D) of
    those taps that do not start their accumulator.
    Outputs: a{tap}_out (B, T, D) of every tap.

    Args:
        starts: for each tap, whether it starts its accumulator.
        spec: sizes of the model.
        precision: precision of every tensor but the coefficients.
    """
    dtype, narrow = ELEMENT_TYPES[DTYPE_OF_PRECISION[precision]].onnx, precision != "fp32"

    def tensor(name: str, *shape: str | int) -> ValueInfoProto:
        return helper.make_tensor_value_info(name, dtype, shape)

    def wide(name: str) -> str:
        if not narrow:
            return name
        nodes.append(helper.make_node("Cast", [name], [f"{name}_32"], to=TensorProto.FLOAT))
        return f"{name}_32"

    feature = ("batch", token_dimension(spec), spec.hidden)
    places = range(len(starts))
    inputs = [
        tensor("g", *feature),
        helper.make_tensor_value_info("coefficients", TensorProto.FLOAT, [len(starts)]),
        *(tensor(f"gate{tap}", "batch", spec.hidden) for tap in places),
        *(tensor(f"a{tap}", *feature) for tap in places if not starts[tap]),
    ]
    gate_shape = helper.make_tensor("gate_shape", TensorProto.INT64, [3], [-1, 1, spec.hidden])
    nodes = [split("coefficients", [f"c{tap}" for tap in places])]
    g = wide("g")
    for tap in places:
        gate = wide(f"gate{tap}")
        out = f"a{tap}_out_32" if narrow else f"a{tap}_out"
        product = out if starts[tap] else f"product{tap}"
        nodes += [
            helper.make_node("Reshape", [gate, "gate_shape"], [f"rows{tap}"]),
            helper.make_node("Mul", [f"rows{tap}", f"c{tap}"], [f"weight{tap}"]),
            helper.make_node("Mul", [f"weight{tap}", g], [product]),
        ]
        if not starts[tap]:
            nodes.append(helper.make_node("Add", [wide(f"a{tap}"), product], [out]))
        if narrow:
            nodes.append(helper.make_node("CastLike", [out, "g"], [f"a{tap}_out"]))
    outputs = [tensor(f"a{tap}_out", *feature) for tap in places]
    return checked_model(
        helper.make_graph(nodes, "accumulate", inputs, outputs, [gate_shape]), functions=[]
    )
