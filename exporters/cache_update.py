"""The cache update as ONNX: ``GocCacheUpdate`` nodes with function bodies, and graphs made of them.

``x_out = x + gate * g`` with ``g = sum(c_i * g_i)``, in float32 whatever the dtype. In a file every update is a node
of domain ``goc`` plus a model-local function plus the attributes ``plugin_namespace`` and ``plugin_version``, so that
ONNX Runtime inlines the body and TensorRT uses the plugin where it is registered.
"""

from __future__ import annotations

import re
from itertools import chain

import onnx
from onnx import FunctionProto, ModelProto, NodeProto, TensorProto, helper

from goc_deploy.errors import EngineDirError
from goc_deploy.spec import ModelSpec

DOMAIN = "goc"
OPSET = 20
TYPES = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
_RUN = re.compile(r"([1-4])(w?)\*(\d+)")


def update_function(entries: int) -> FunctionProto:
    """The body of ``GocCacheUpdateN`` for N history entries.

    Inputs: x (B, T, D), gate (B, 1, D), coefficients (N,) float32, g0..g(N-1) (B, T, D). Outputs: x_out, g.
    """
    history = [f"g{i}" for i in range(entries)]
    scalars = [f"c{i}" for i in range(entries)]
    nodes = [_split("coefficients", scalars), _cast("x", "x32"), _cast("gate", "gate32")]
    nodes += [_cast(g, f"{g}_32") for g in history]
    if (
        entries == 1
    ):  # the coefficient goes into the gate, which is small, so that a prediction nobody stores costs no pass
        nodes += [
            helper.make_node("Mul", ["gate32", "c0"], ["scaled_gate"]),
            helper.make_node("Mul", ["scaled_gate", "g0_32"], ["update"]),
            helper.make_node("Mul", ["c0", "g0_32"], ["g32"]),
        ]
    else:
        nodes += [
            helper.make_node("Mul", [c, f"{g}_32"], [f"{g}_scaled"]) for c, g in zip(scalars, history, strict=True)
        ]
        total = f"{history[0]}_scaled"
        for i, g in enumerate(history[1:], 1):
            out = "g32" if i == entries - 1 else f"sum{i}"
            nodes.append(helper.make_node("Add", [total, f"{g}_scaled"], [out]))
            total = out
        nodes.append(helper.make_node("Mul", ["gate32", "g32"], ["update"]))
    nodes += [
        helper.make_node("Add", ["x32", "update"], ["x_out32"]),
        helper.make_node("CastLike", ["x_out32", "x"], ["x_out"]),
        helper.make_node("CastLike", ["g32", "x"], ["g"]),
    ]
    return helper.make_function(
        DOMAIN,
        f"GocCacheUpdate{entries}",
        ["x", "gate", "coefficients", *history],
        ["x_out", "g"],
        nodes,
        [helper.make_opsetid("", OPSET)],
    )


def _cast(source: str, target: str) -> NodeProto:
    return helper.make_node("Cast", [source], [target], to=TensorProto.FLOAT)


def entries_from_signature(signature: str) -> list[tuple[int, bool]]:
    """``"1*2 2w*1"`` to ``[(1, False), (1, False), (2, True)]``: history entries read, and whether g is stored.

    Raises:
        EngineDirError: not a signature.
    """
    runs = [_RUN.fullmatch(word) for word in signature.split(" ")]
    if not runs or not all(runs):
        raise EngineDirError(f"{signature!r} is not a predict signature")
    return list(chain.from_iterable([(int(m[1]), bool(m[2]))] * int(m[3]) for m in runs if m))


def predict_graph(signature: str, spec: ModelSpec, precision: str) -> ModelProto:
    """One launch that predicts neighbouring units: a chain of updates on x, so each unit's tensors stay in cache.

    Inputs: x (B, T, D), gates (n, B, D), coefficients (all units' rows joined) float32, g{unit}_{entry} (B, T, D).
    Outputs: x_out, and g{unit} where it is stored.
    """
    entries = entries_from_signature(signature)
    dtype, n = TYPES[precision], len(entries)
    feature: list[str | int | None] = ["batch", spec.tokens, spec.hidden]
    inputs = [
        helper.make_tensor_value_info("x", dtype, feature),
        helper.make_tensor_value_info("gates", dtype, [n, "batch", spec.hidden]),
        helper.make_tensor_value_info("coefficients", TensorProto.FLOAT, [sum(k for k, _ in entries)]),
    ]
    outputs = [helper.make_tensor_value_info("x_out", dtype, feature)]
    gate_shape = helper.make_tensor("gate_shape", TensorProto.INT64, [3], [-1, 1, spec.hidden])
    widths = helper.make_tensor("widths", TensorProto.INT64, [n], [k for k, _ in entries])
    nodes = [
        _split("gates", [f"gate{u}" for u in range(n)]),
        helper.make_node("Split", ["coefficients", "widths"], [f"row{u}" for u in range(n)], axis=0),
    ]
    x = "x"
    for u, (k, stored) in enumerate(entries):
        history = [f"g{u}_{i}" for i in range(k)]
        inputs += [helper.make_tensor_value_info(g, dtype, feature) for g in history]
        nodes.append(helper.make_node("Reshape", [f"gate{u}", "gate_shape"], [f"gate{u}_rows"]))
        x_out = "x_out" if u == n - 1 else f"x{u}"
        nodes.append(
            helper.make_node(
                f"GocCacheUpdate{k}",
                [x, f"gate{u}_rows", f"row{u}", *history],
                [x_out, f"g{u}"],
                name=f"update{u}",
                domain=DOMAIN,
                plugin_namespace=DOMAIN,
                plugin_version="1",
            )
        )
        if stored:
            outputs.append(helper.make_tensor_value_info(f"g{u}", dtype, feature))
        x = x_out
    graph = helper.make_graph(nodes, "predict", inputs, outputs, [gate_shape, widths])
    return _model(graph, [update_function(k) for k in sorted({k for k, _ in entries})])


def _split(source: str, targets: list[str]) -> NodeProto:
    if len(targets) == 1:
        return helper.make_node("Identity", [source], targets)
    return helper.make_node("Split", [source], targets, axis=0, num_outputs=len(targets))


def _model(graph: onnx.GraphProto, functions: list[FunctionProto]) -> ModelProto:
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(
        graph, functions=functions, opset_imports=opsets, ir_version=10, producer_name="goc_deploy"
    )
    onnx.checker.check_model(model, full_check=True)
    return model
