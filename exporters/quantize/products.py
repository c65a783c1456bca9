"""The matrix products of a graph with constant weights, and their form with quantised weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from onnx import ModelProto, NodeProto, TensorProto, helper

from goc_deploy.exporters.quantize.blocks import BLOCK
from goc_deploy.precision import ELEMENT_TYPES

OPSET = 21  # the first that dequantises by blocks
ZERO_POINT = "zero_point"  # 0 of int8 or float8; without one, QuantizeLinear returns uint8


@dataclass(frozen=True, slots=True)
class Product:
    """A matrix product ``x @ W + bias`` whose weight can be quantised.

    Attributes:
        node: name of the node's output, which identifies the node.
        weight: name of the initializer.
        transposed: whether the initializer is (N, K), the transpose of W.
        shape: (K, N), the shape of W.
    """

    node: str
    weight: str
    transposed: bool
    shape: tuple[int, int]

    @property
    def scales(self) -> str:
        """Name of the initializer of the scales, (K / BLOCK, N)."""
        return f"{self.weight}.scales"

    @property
    def scales_shape(self) -> tuple[int, int]:
        """Shape of the scales by blocks."""
        return self.shape[0] // BLOCK, self.shape[1]

    @property
    def input_scale(self) -> str:
        """Name of the initializer of the scale of x, a scalar, if x is quantised."""
        return f"{self.weight}.input_scale"

    @property
    def smoothing(self) -> str:
        """Name of the initializer of the factors of x, (K,), if x is smoothed."""
        return f"{self.weight}.smoothing"


def products_of(model: ModelProto) -> tuple[Product, ...]:
    """Find the products of a graph with a weight outside its file that nothing else reads.

    Left out are weights whose K is not a multiple of ``BLOCK`` or whose N is odd.
    """
    weights = {
        tensor.name: tuple(tensor.dims)
        for tensor in model.graph.initializer
        if tensor.data_location == TensorProto.EXTERNAL and len(tensor.dims) == 2
    }
    reads = Counter(name for node in model.graph.node for name in node.input)
    products = []
    for node in model.graph.node:
        name = node.input[1] if len(node.input) > 1 else ""
        if name not in weights or reads[name] != 1 or not _is_plain(node):
            continue
        transposed = bool(_attributes(node).get("transB", 0))
        rows, columns = reversed(weights[name]) if transposed else weights[name]
        if rows % BLOCK == 0 and columns % 2 == 0:
            products.append(Product(node.output[0], name, transposed, (rows, columns)))
    return tuple(products)


def quantize_products(
    model: ModelProto,
    products: Collection[Product],
    dtype: str,
    smoothed: Mapping[str, bool] | None = None,
) -> None:
    """Let a graph read quantised weights.

    ``y = Gemm(x, W, bias)`` becomes::

        W.dequantized = DequantizeLinear<axis=0, block_size=BLOCK>(W, W.scales)
        y.product     = MatMul(x, W.dequantized)
        y             = Add(y.product, bias)

    ONNX Runtime fuses these three nodes into one that reads the integers. It does not fuse a Gemm.
    With ``smoothed``, x is quantised too, and a column of W has one scale::

        W.smoothed    = Mul(x, W.smoothing)
        W.input       = QuantizeLinear(W.smoothed, W.input_scale, zero_point)
        W.rounded     = DequantizeLinear(W.input, W.input_scale, zero_point)
        W.dequantized = DequantizeLinear<axis=1>(W, W.scales)
        y.product     = MatMul(W.rounded, W.dequantized)
        y             = Add(y.product, bias)

    The first node is left out for a product that is not smoothed.

    Args:
        model: the graph, which is changed. Its initializers W become (K, N) of ``dtype``, and
            scales of the former element type are added; the places of both are unset.
        products: products of the graph, from `products_of`.
        dtype: ``int8``, ``int4`` or ``float8_e4m3fn``.
        smoothed: weight -> whether x is multiplied by factors; None leaves x in its precision.
    """
    by_node = {product.node: product for product in products}
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        product = by_node.get(node.output[0])
        if product is None:
            nodes.append(node)
        else:
            smooth = None if smoothed is None else smoothed[product.weight]
            nodes += _nodes(node, product, smooth)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    by_weight = {product.weight: product for product in products}
    tensors: list[TensorProto] = []
    for tensor in model.graph.initializer:
        product = by_weight.get(tensor.name)
        if product is None:
            tensors.append(tensor)
            continue
        tensors.append(_outside(product.weight, product.shape, ELEMENT_TYPES[dtype].onnx))
        smooth = None if smoothed is None else smoothed[product.weight]
        tensors += [
            _outside(name, shape, tensor.data_type) for name, shape in scales_of(product, smooth)
        ]
    if smoothed is not None:
        zero = TensorProto(name=ZERO_POINT, data_type=ELEMENT_TYPES[dtype].onnx, raw_data=b"\0")
        tensors.append(zero)
    del model.graph.initializer[:]
    model.graph.initializer.extend(tensors)
    described = [value for value in model.graph.value_info if value.name not in by_weight]
    del model.graph.value_info[:]
    model.graph.value_info.extend(described)
    for opset in model.opset_import:
        if opset.domain in ("", "ai.onnx"):
            opset.version = max(opset.version, OPSET)


def scales_of(product: Product, smooth: bool | None) -> list[tuple[str, tuple[int, ...]]]:
    """Name and shape of the initializers that are added for a product.

    Args:
        product: the product.
        smooth: whether x is smoothed, or None if x is not quantised.
    """
    if smooth is None:
        return [(product.scales, product.scales_shape)]
    rows, columns = product.shape
    factors: list[tuple[str, tuple[int, ...]]] = [(product.smoothing, (rows,))] if smooth else []
    return [(product.scales, (columns,)), (product.input_scale, ()), *factors]


def place_tensors(model: ModelProto, location: str, places: Mapping[str, tuple[int, int]]) -> None:
    """Set where initializers outside the file lie: name -> (offset, length) in ``location``."""
    for tensor in model.graph.initializer:
        if tensor.name in places:
            offset, length = places[tensor.name]
            del tensor.external_data[:]
            for key, value in (("location", location), ("offset", offset), ("length", length)):
                tensor.external_data.add(key=key, value=str(value))


def _nodes(node: NodeProto, product: Product, smooth: bool | None) -> list[NodeProto]:
    weight, output = f"{product.weight}.dequantized", node.output[0]
    bias = node.input[2] if len(node.input) > 2 else ""
    result = f"{output}.product" if bias else output
    by_blocks: dict[str, Any] = {"axis": 0, "block_size": BLOCK} if smooth is None else {"axis": 1}
    source, nodes = node.input[0], []
    if smooth is not None:
        source, nodes = f"{product.weight}.rounded", _rounding(node.input[0], product, smooth)
    nodes += [
        helper.make_node(
            "DequantizeLinear", [product.weight, product.scales], [weight], **by_blocks
        ),
        helper.make_node("MatMul", [source, weight], [result]),
    ]
    return [*nodes, helper.make_node("Add", [result, bias], [output])] if bias else nodes


def _rounding(x: str, product: Product, smooth: bool) -> list[NodeProto]:
    """The nodes that round the first operand of a product to the type of its weight."""
    nodes, integers = [], f"{product.weight}.input"
    if smooth:
        smoothed = f"{product.weight}.smoothed"
        nodes = [helper.make_node("Mul", [x, product.smoothing], [smoothed])]
        x = smoothed
    scale = [product.input_scale, ZERO_POINT]
    return [
        *nodes,
        helper.make_node("QuantizeLinear", [x, *scale], [integers]),
        helper.make_node("DequantizeLinear", [integers, *scale], [f"{product.weight}.rounded"]),
    ]


def _is_plain(node: NodeProto) -> bool:
    """Whether a node is a product without a factor and without a transposed first operand."""
    values = _attributes(node)
    return node.op_type == "MatMul" or (
        node.op_type == "Gemm"
        and values.get("alpha", 1.0) == values.get("beta", 1.0) == 1.0
        and not values.get("transA", 0)
    )


def _attributes(node: NodeProto) -> dict[str, float]:
    return {field.name: helper.get_attribute_value(field) for field in node.attribute}


def _outside(name: str, shape: tuple[int, ...], data_type: int) -> TensorProto:
    return TensorProto(
        name=name, data_type=data_type, dims=shape, data_location=TensorProto.EXTERNAL
    )
