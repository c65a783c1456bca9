"""The cache update as ONNX: ``GocCacheUpdate`` nodes with function bodies, and graphs made of them.

An update is ``x_out = x + c0 * gate * g`` with ``g = g0 + c1 * g1 + ...``, computed in float32 for
every dtype. ``GocCacheApply`` is the same for a prediction that is not stored. In a file, every
update is a node of domain ``goc`` with a model-local function and the attributes
``plugin_namespace`` and ``plugin_version``. ONNX Runtime inlines the function, and TensorRT uses
the plugin if it is registered.
"""

from __future__ import annotations

import onnx
from onnx import FunctionProto, ModelProto, NodeProto, TensorProto, helper, parser

from goc_deploy.compiler.cache_ops import (
    CACHE_DOMAIN,
    PLUGIN_VERSION,
    update_name,
    updates_from_signature,
)
from goc_deploy.exporters.graphs.step import token_dimension
from goc_deploy.precision import DTYPE_OF_PRECISION, ELEMENT_TYPES, Precision
from goc_deploy.spec import ModelSpec

OPSET = 20


def update_function(entries: int, *, stores: bool, precision: Precision) -> FunctionProto:
    """The body of ``GocCacheUpdateN`` (outputs x_out and g) or ``GocCacheApplyN`` (x_out only).

    ``g = g0 + c1 * g1 + ...`` and ``x_out = x + (c0 * gate) * g``. c0 is multiplied with the gate,
    which is the smaller tensor. Every entry is read before g is written, so g may share memory with
    an entry, and x_out with x.

    Inputs of the function: x (B, T, D), gate (B, 1, D), coefficients c (N,) float32, and
    g0..g(N-1) (B, T, D).

    Args:
        entries: N, the number of history entries.
        stores: whether g is an output.
        precision: precision of x, gate and the entries.
    """
    narrow = precision != "fp32"
    history = [f"g{i}" for i in range(entries)]
    wide = {name: f"{name}_32" if narrow else name for name in ("x", "gate", *history)}
    lines = [f"{wide[name]} = Cast<to=1>({name})" for name in wide if narrow]
    lines.append(
        f"{', '.join(f'c{i}' for i in range(entries))} = {_split_text('coefficients', entries)}"
    )
    before = wide["g0"]
    for i in range(1, entries):
        total = "g" if i == entries - 1 and not narrow else f"sum{i}"
        lines += [f"scaled{i} = Mul(c{i}, {wide[f'g{i}']})", f"{total} = Add({before}, scaled{i})"]
        before = total
    if stores and before != "g":
        lines.append(
            f"g = {'CastLike' if narrow else 'Identity'}({before}{', x' if narrow else ''})"
        )
    lines += [f"scaled_gate = Mul({wide['gate']}, c0)", f"update = Mul(scaled_gate, {before})"]
    if narrow:
        lines += ["total = Add(x_32, update)", "x_out = CastLike(total, x)"]
    else:
        lines.append("x_out = Add(x, update)")  # an Identity after the sum would cost a copy
    inputs = ", ".join(["x", "gate", "coefficients", *history])
    header = f'<domain: "{CACHE_DOMAIN}", opset_import: ["" : {OPSET}]>'
    outputs = "(x_out, g)" if stores else "(x_out)"
    body = "\n".join(lines)
    return parser.parse_function(
        f"{header} {update_name(entries, stores=stores)} ({inputs}) => {outputs} {{ {body} }}"
    )


def _split_text(source: str, count: int) -> str:
    return f"Split<axis=0, num_outputs={count}>({source})" if count > 1 else f"Identity({source})"


def predict_graph(signature: str, spec: ModelSpec, precision: Precision) -> ModelProto:
    """The graph of a launch that predicts n adjacent units: a chain of updates on x.

    Inputs: x (B, T, D), gates (n, B, D), coefficients float32 (the rows of all units, joined), and
    g{unit}_{entry} (B, T, D).
    Outputs: x_out (B, T, D), and g{unit} (B, T, D) of every unit whose prediction is stored.

    Args:
        signature: entries and storage of every unit, see `goc_deploy.compiler.cache_ops`.
        spec: sizes of the model.
        precision: precision of x, gates and the entries.
    """
    entries = updates_from_signature(signature)
    dtype, n = ELEMENT_TYPES[DTYPE_OF_PRECISION[precision]].onnx, len(entries)
    feature: list[str | int | None] = ["batch", token_dimension(spec), spec.hidden]
    inputs = [
        helper.make_tensor_value_info("x", dtype, feature),
        helper.make_tensor_value_info("gates", dtype, [n, "batch", spec.hidden]),
        helper.make_tensor_value_info(
            "coefficients", TensorProto.FLOAT, [sum(k for k, _ in entries)]
        ),
    ]
    outputs = [helper.make_tensor_value_info("x_out", dtype, feature)]
    gate_shape = helper.make_tensor("gate_shape", TensorProto.INT64, [3], [-1, 1, spec.hidden])
    widths = helper.make_tensor("widths", TensorProto.INT64, [n], [k for k, _ in entries])
    nodes = [
        split("gates", [f"gate{u}" for u in range(n)]),
        helper.make_node(
            "Split", ["coefficients", "widths"], [f"row{u}" for u in range(n)], axis=0
        ),
    ]
    x = "x"
    for u, (k, stored) in enumerate(entries):
        history = [f"g{u}_{i}" for i in range(k)]
        inputs += [helper.make_tensor_value_info(g, dtype, feature) for g in history]
        nodes.append(helper.make_node("Reshape", [f"gate{u}", "gate_shape"], [f"gate{u}_rows"]))
        x_out = "x_out" if u == n - 1 else f"x{u}"
        nodes.append(
            helper.make_node(
                update_name(k, stores=stored),
                [x, f"gate{u}_rows", f"row{u}", *history],
                [x_out, f"g{u}"] if stored else [x_out],
                name=f"update{u}",
                domain=CACHE_DOMAIN,
                plugin_namespace=CACHE_DOMAIN,
                plugin_version=PLUGIN_VERSION,
            )
        )
        if stored:
            outputs.append(helper.make_tensor_value_info(f"g{u}", dtype, feature))
        x = x_out
    graph = helper.make_graph(nodes, "predict", inputs, outputs, [gate_shape, widths])
    kinds = sorted(set(entries))
    return checked_model(
        graph, [update_function(k, stores=stored, precision=precision) for k, stored in kinds]
    )


def split(source: str, targets: list[str]) -> NodeProto:
    """A node that splits a tensor along its first dimension."""
    if len(targets) == 1:
        return helper.make_node("Identity", [source], targets)
    return helper.make_node("Split", [source], targets, axis=0, num_outputs=len(targets))


def checked_model(graph: onnx.GraphProto, functions: list[FunctionProto]) -> ModelProto:
    """A model of a graph and its functions, after ONNX's own check."""
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CACHE_DOMAIN, 1)]
    model = helper.make_model(
        graph, functions=functions, opset_imports=opsets, ir_version=10, producer_name="goc_deploy"
    )
    onnx.checker.check_model(model, full_check=True)
    return model
