"""Limits of a graph in an engine directory, checked before ONNX Runtime or TensorRT reads it.

Anyone who can write a manifest can list any graph in it. A graph that passes only computes with
its inputs and initializers: it opens no file, has no loop, calls no operator that allocates by a
number, and returns the same result on every run.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from goc_deploy.engine_dir.manifest import GraphEntry
from goc_deploy.engine_dir.onnx_messages import model_from_bytes
from goc_deploy.errors import EngineDirError, SafetyError

ELEMENTWISE = (
    "Abs Add And Cast CastLike Clip Cos DequantizeLinear Div Equal Erf Exp Gelu Greater "
    "GreaterOrEqual Identity Less LessOrEqual Log Max Min "
    "Mul Neg Not Or Pow QuantizeLinear Reciprocal Relu Sigmoid Sin Sqrt Sub Tanh Where"
)
ALONG_DIMENSIONS = (
    "Conv Gemm InstanceNormalization LayerNormalization MatMul ReduceMax ReduceMean ReduceSum "
    "Softmax"
)
LAYOUT = (
    "Concat Constant Expand Flatten Gather Reshape Resize Shape Slice Split Squeeze Transpose "
    "Unsqueeze"
)
OPERATORS = frozenset(f"{ELEMENTWISE} {ALONG_DIMENSIONS} {LAYOUT}".split())
FUNCTION_DOMAIN, FUNCTION_PREFIX = "goc", "Goc"  # functions whose body is in the file
MAX_GRAPH_BYTES = 64 * 2**20
MAX_ELEMENTS = 2**31  # of one tensor
MAX_PADDING, MAX_SCALE = 64, 8
_STANDARD = frozenset(("", "ai.onnx"))
# float32, int8, int32, int64, bool, float16, bfloat16, float8e4m3fn, int4
_DTYPES = frozenset((1, 3, 6, 7, 9, 10, 16, 17, 22))
# At byte 4. ONNX Runtime then reads its own format, whatever the other bytes are.
_ORT_FORMAT = b"ORTM"
_EXTERNAL = 1
_PLACE = frozenset(("location", "offset", "length", "checksum"))


@dataclass(frozen=True, slots=True)
class ExternalTensor:
    """An initializer whose values are in a file that the manifest names.

    Attributes:
        location: name of the file in the graph.
        shape: dimensions.
    """

    location: str
    shape: tuple[int, ...]


def external_tensors(parts: Mapping[str, GraphEntry]) -> dict[str, ExternalTensor]:
    """Return by name the initializers that a graph may have outside its file.

    Args:
        parts: parts of the graph, see `goc_deploy.engine_dir.manifest.Manifest.parts`.
    """
    return {
        prefix + p.name: ExternalTensor(PurePosixPath(unit.weights_file or "").name, p.shape)
        for prefix, unit in parts.items()
        if not unit.weights_are_inputs
        for p in unit.parameters
    }


def check_graph(
    content: bytes | memoryview, external: Mapping[str, ExternalTensor], where: str
) -> None:
    """Check a graph from an untrusted source.

    Args:
        content: an ONNX file.
        external: the initializers that the graph may have outside its file.
        where: name of the graph for messages.

    Raises:
        SafetyError: the graph asks for a file, or for memory at an address.
        EngineDirError: the content is no ONNX file, or has an operator, subgraph or size that no
            graph of goc_deploy has.
    """
    if len(content) > MAX_GRAPH_BYTES:
        raise EngineDirError(
            f"{where} has {len(content)} bytes; at most {MAX_GRAPH_BYTES} are accepted; "
            "export again"
        )
    if bytes(content[4:8]) == _ORT_FORMAT:
        raise EngineDirError(f"{where} is not in ONNX format; export again")
    try:
        model = model_from_bytes(bytes(content))
        _check_operators(model)
        _check_sizes(model, len(content))
    except ValueError as cause:
        raise EngineDirError(
            f"{where} is not a graph that goc_deploy wrote: {cause}; export again"
        ) from cause
    _check_places(model, external, where)


def _check_operators(model: Any) -> None:
    opsets = [
        *model.opset_import,
        *(opset for function in model.functions for opset in function.opset_import),
    ]
    for opset in opsets:
        if opset.domain not in (*_STANDARD, FUNCTION_DOMAIN):
            raise ValueError(f"it uses operators of domain {opset.domain!r}")
    functions = [function.name for function in model.functions]
    for function in model.functions:
        if function.domain != FUNCTION_DOMAIN or not function.name.startswith(FUNCTION_PREFIX):
            raise ValueError(f"it defines function {function.domain}::{function.name}")
        _check_nodes(function.node, frozenset(), ())  # bodies that call functions would multiply
    if len(set(functions)) != len(functions):
        raise ValueError("it defines a function twice")
    _check_nodes(model.graph.node, frozenset(functions), model.graph.initializer)


def _check_nodes(
    nodes: Iterable[Any], functions: frozenset[str], initializers: Iterable[Any]
) -> None:
    values = {tensor.name: tensor for tensor in initializers}
    sources = {name: node.op_type for node in nodes for name in node.output}
    for node in nodes:
        allowed = (
            OPERATORS
            if node.domain in _STANDARD
            else functions
            if node.domain == FUNCTION_DOMAIN
            else ()
        )
        if node.op_type not in allowed:
            raise ValueError(f"it has operator {node.domain or 'ai.onnx'}::{node.op_type}")
        if node.op_type == "Expand" and [sources.get(name) for name in node.input[1:]] != ["Shape"]:
            raise ValueError("it expands a tensor to another shape than that of a tensor")
        if node.op_type == "Resize":
            scales = [scale for name in node.input[2:] for scale in _floats(values.get(name))]
            if (
                len(node.input) != 3
                or not scales
                or not all(0 < scale <= MAX_SCALE for scale in scales)
            ):
                raise ValueError(f"it makes a tensor more than {MAX_SCALE} times as large")
        if any(
            size > MAX_PADDING
            for field in node.attribute
            if field.name == "pads"
            for size in field.ints
        ):
            raise ValueError(f"it pads by more than {MAX_PADDING}")


def _floats(tensor: Any) -> tuple[float, ...]:
    """The values of a small float32 tensor in the file; empty if there is no such tensor."""
    if tensor is None or tensor.data_location or len(tensor.raw_data) % 4:
        return ()
    return (*tensor.float_data, *struct.unpack(f"<{len(tensor.raw_data) // 4}f", tensor.raw_data))


def _check_sizes(model: Any, nbytes: int) -> None:
    for tensor in _tensors(model):
        elements = _elements(tensor.dims)
        if tensor.data_type not in _DTYPES:
            raise ValueError(f"tensor {tensor.name!r} has element type {tensor.data_type}")
        if not tensor.data_location and elements > nbytes:
            raise ValueError(
                f"tensor {tensor.name!r} claims {elements} elements, more than the file can hold"
            )
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        _elements(dim.dim_value for dim in value.type.tensor_type.shape.dim if dim.dim_value)


def _elements(dims: Iterable[int]) -> int:
    sizes = list(dims)
    if any(size < 0 for size in sizes) or math.prod(sizes) > MAX_ELEMENTS:
        raise ValueError(f"it has a tensor of shape {sizes}")
    return math.prod(sizes)


def _tensors(model: Any) -> list[Any]:
    """Return the initializers and the tensors in attributes of nodes."""
    nodes = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    values = [
        attribute.t for node in nodes for attribute in node.attribute if attribute.HasField("t")
    ]
    return [*model.graph.initializer, *values]


def _check_places(model: Any, external: Mapping[str, ExternalTensor], where: str) -> None:
    names = [tensor.name for tensor in model.graph.initializer]
    if len(set(names)) != len(names):
        raise EngineDirError(
            f"{where} is not a graph that goc_deploy wrote: two initializers have one name; "
            "export again"
        )
    inside = len(names)
    for index, tensor in enumerate(_tensors(model)):
        if not tensor.data_location and not tensor.external_data:
            continue
        place = {entry.key: entry.value for entry in tensor.external_data}
        listed = external.get(tensor.name) if index < inside else None
        expected = (
            tensor.data_location == _EXTERNAL
            and listed is not None
            and place.get("location") == listed.location
        )
        if not expected or len(place) != len(tensor.external_data) or not place.keys() <= _PLACE:
            raise SafetyError(
                f"{where} asks for the values of {tensor.name!r} from "
                f"{place.get('location')!r}, which the manifest does not say; do not use this "
                "directory"
            )
        if listed is not None and tuple(tensor.dims) != listed.shape:
            raise EngineDirError(
                f"{where} has {tensor.name!r} of shape {list(tensor.dims)} but the manifest says "
                f"{list(listed.shape)}; export again"
            )
