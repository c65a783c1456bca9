"""ONNX graphs in the form for a TensorRT parser: weights inside, or as inputs at addresses.

Weights come from verified memory; the file that the ONNX graph names is never opened.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from goc_deploy.engine_dir.keys import Range
from goc_deploy.engine_dir.manifest import GraphEntry
from goc_deploy.errors import EngineDirError, ResourceError

MAX_GRAPH_BYTES = 2**31 - 1  # limit of protobuf, the format of ONNX


def model_from_bytes(content: memoryview, where: str) -> Any:
    """Read an ONNX graph without its weights.

    Raises:
        EngineDirError: the content is not a graph.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load_model_from_string(bytes(content))
    except DecodeError as cause:
        raise EngineDirError(f"{where} is not an ONNX graph; export again") from cause
    model.graph.name = "unit"  # so that graphs of isomorphic units are equal
    return model


def share_weights(model: Any) -> None:
    """Turn external initializers into inputs of the same name, shape and type."""
    from onnx import helper

    for initializer in _external(model):
        value = helper.make_tensor_value_info(
            initializer.name, initializer.data_type, list(initializer.dims)
        )
        model.graph.input.append(value)
    _keep_internal(model)


def drop_weight_places(model: Any) -> None:
    """Remove the places of external initializers, which are in the manifest."""
    for initializer in _external(model):
        del initializer.external_data[:]


def embed_weights(
    model: Any,
    unit: GraphEntry,
    weights: memoryview,
    where: str,
    prefix: str = "",
) -> None:
    """Put the values of external initializers into the graph.

    Args:
        model: the graph.
        unit: the unit whose weights are put in, with the position of each tensor.
        weights: content of the unit's weights file.
        where: name of the graph for messages.
        prefix: prefix of the initializers of these weights in a graph of several units.

    Raises:
        EngineDirError: the manifest lacks an initializer, or has it in another shape.
        ResourceError: the weights are larger than one graph can be.
    """
    from onnx import TensorProto

    if len(weights) > MAX_GRAPH_BYTES:
        raise ResourceError(
            f"{where}: {len(weights) / 1e9:.1f} GB of weights do not fit into one graph; "
            "use `EngineOptions.weight_mode=shared`"
        )
    by_name = {prefix + p.name: p for p in unit.parameters}
    for initializer in _external(model):
        if not initializer.name.startswith(prefix):
            continue
        parameter = by_name.get(initializer.name)
        if parameter is None or parameter.shape != tuple(initializer.dims):
            raise EngineDirError(
                f"{where}: the manifest does not describe initializer {initializer.name}; export "
                "again"
            )
        initializer.raw_data = bytes(weights[parameter.offset : unit.end(parameter)])
        initializer.data_location = TensorProto.DEFAULT
        del initializer.external_data[:]


def graph_bytes(model: Any) -> bytes:
    """Write the graph as bytes that depend on its content only."""
    return bytes(model.SerializeToString(deterministic=True))


Shapes = Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


def input_shapes(
    model: Any, ranges: Mapping[str, Range], where: str
) -> tuple[Shapes, tuple[tuple[str, Range], ...]]:
    """Return the smallest, usual and largest shape of each input with dynamic dimensions.

    Returns:
        Input -> shapes, and the ranges that were used.

    Raises:
        EngineDirError: a dynamic dimension has no range.
    """
    shapes, used = {}, {}
    for value in model.graph.input:
        sizes: list[Range] = []
        for dimension in value.type.tensor_type.shape.dim:
            symbol, size = dimension.dim_param, dimension.dim_value
            if not symbol and not size:
                raise EngineDirError(
                    f"{where}: input {value.name} has a dimension without name or size; export "
                    "again"
                )
            if symbol and symbol not in ranges:
                raise EngineDirError(
                    f"{where}: input {value.name} has the dynamic dimension {symbol!r}, whose "
                    "sizes this version does not know; export again"
                )
            if symbol:
                used[symbol] = ranges[symbol]
            sizes.append(ranges[symbol] if symbol else (size, size, size))
        if any(dimension.dim_param for dimension in value.type.tensor_type.shape.dim):
            low, usual, high = (tuple(size[i] for size in sizes) for i in range(3))
            shapes[value.name] = (low, usual, high)
    return shapes, tuple(sorted(used.items()))


def _external(model: Any) -> list[Any]:
    return [
        initializer for initializer in model.graph.initializer if initializer.data_location == 1
    ]


def _keep_internal(model: Any) -> None:
    kept = [
        initializer for initializer in model.graph.initializer if initializer.data_location != 1
    ]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
