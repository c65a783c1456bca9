"""Segments: the graph of all units of a full step, made of the graphs of the units."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from onnx import GraphProto, ModelProto, helper
from onnx.compose import add_prefix_graph


def segment_graph(units: Mapping[str, ModelProto], stores: Sequence[bool]) -> ModelProto:
    """Chain units: each reads the tokens that the preceding unit writes.

    Tensor ``name`` of a unit becomes ``UNIT.name``. This concerns its feature, its inputs other
    than the tokens, and its initializers, whose data stays in the weights file of the unit.

    Inputs: x (B, T, D) and the other inputs of the units. Outputs: x_out (B, T, D) and features
    (B * T, D).

    Args:
        units: unit name -> graph, in order.
        stores: for each unit, whether its feature is an output.
    """
    segment, x = ModelProto(), "x"
    segment.CopyFrom(next(iter(units.values())))
    segment.graph.Clear()
    segment.graph.name = "segment"
    for (name, model), stored in zip(units.items(), stores, strict=True):
        unit = add_prefix_graph(model.graph, f"{name}.")
        tokens, x = x, f"{name}.x_out"
        _rename(unit, f"{name}.x", tokens)
        segment.graph.input.extend(
            value for value in unit.input if value.name == "x" or value.name != tokens
        )
        segment.graph.initializer.extend(unit.initializer)
        segment.graph.node.extend(unit.node)
        segment.graph.output.extend(value for value in unit.output if stored and value.name != x)
        last = next(value for value in unit.output if value.name == x)
    segment.graph.output.append(last)
    _take_newest_opsets(segment, units.values())
    _rename(segment.graph, x, "x_out")
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
