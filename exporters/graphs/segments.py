"""Segments: the graph of all units of a full step, made of the graphs of the units."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from onnx import GraphProto, ModelProto, ValueInfoProto, helper
from onnx.compose import add_prefix_graph


def segment_graph(units: Mapping[str, ModelProto], kept: Collection[str]) -> ModelProto:
    """Chain units: each reads the tokens that the units before it write.

    Tensor ``name`` of a unit becomes ``UNIT.name``. This concerns its features, its inputs other
    than the tokens, and its initializers, whose data stays in the weights file of the unit.

    Inputs: x (B, T, D), text (B, Lc, D) and reference (B, R, D) if units read them, and the other
    inputs of the units. Outputs: x_out (B, T, D) and features (B * T, D), (B * Lc, D) or
    (B * R, D).

    Args:
        units: unit name -> graph, in order.
        kept: the features that are outputs, as ``UNIT.feature``.
    """
    segment = ModelProto()
    # The name of the newest tokens of each stream:
    latest = {stream: stream for stream in ("x", "text", "reference")}
    read: set[str] = set()
    tokens: dict[str, ValueInfoProto] = {}
    segment.CopyFrom(next(iter(units.values())))
    segment.graph.Clear()
    segment.graph.name = "segment"
    for name, model in units.items():
        unit = add_prefix_graph(model.graph, f"{name}.")
        for stream, newest in latest.items():
            _rename(unit, f"{name}.{stream}", newest)
        written = {stream: f"{name}.{stream}_out" for stream in latest}
        inner = read | (set(latest.values()) - latest.keys())
        segment.graph.input.extend(value for value in unit.input if value.name not in inner)
        read |= latest.keys() & {value.name for value in unit.input}
        segment.graph.initializer.extend(unit.initializer)
        segment.graph.node.extend(unit.node)
        segment.graph.output.extend(value for value in unit.output if value.name in kept)
        tokens |= {value.name: value for value in unit.output if value.name in written.values()}
        latest |= {stream: out for stream, out in written.items() if out in tokens}
    segment.graph.output.append(tokens[latest["x"]])
    _take_newest_opsets(segment, units.values())
    _rename(segment.graph, latest["x"], "x_out")
    return segment


def _take_newest_opsets(segment: ModelProto, units: Iterable[ModelProto]) -> None:
    """Declare the newest opsets of the units: quantised units need a newer one than others."""
    newest: dict[str, int] = {}
    for unit in units:
        for opset in unit.opset_import:
            newest[opset.domain] = max(opset.version, newest.get(opset.domain, 0))
    del segment.opset_import[:]
    segment.opset_import.extend(
        helper.make_opsetid(domain, version) for domain, version in newest.items()
    )


def _rename(graph: GraphProto, old: str, new: str) -> None:
    """Rename a tensor."""
    for value in (*graph.input, *graph.output):
        value.name = new if value.name == old else value.name
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [new if name == old else name for name in names]
