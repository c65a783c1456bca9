"""The matrix products of a graph with constant weights, and their form with quantised weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from onnx import ModelProto, NodeProto, TensorProto, helper

from goc_deploy.exporters.quantize.blocks import BLOCK
from goc_deploy.precision import ELEMENT_TYPES

OPSET = 21  # the first that dequantises by blocks


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
        """Shape of the scales."""
        return self.shape[0] // BLOCK, self.shape[1]


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
    found = []
    for node in model.graph.node:
        name = node.input[1] if len(node.input) > 1 else ""
        if name not in weights or reads[name] != 1 or not _is_plain(node):
            continue
        transposed = bool(_attributes(node).get("transB", 0))
        rows, columns = reversed(weights[name]) if transposed else weights[name]
        if rows % BLOCK == 0 and columns % 2 == 0:
            found.append(Product(node.output[0], name, transposed, (rows, columns)))
    return tuple(found)


def quantize_products(model: ModelProto, products: Collection[Product], dtype: str) -> None:
    """Let a graph read quantised weights.

    ``y = Gemm(x, W, bias)`` becomes::

        W.dequantized = DequantizeLinear<axis=0, block_size=BLOCK>(W, W.scales)
        y.product     = MatMul(x, W.dequantized)
        y             = Add(y.product, bias)

    ONNX Runtime fuses these three nodes into one that reads the integers. It does not fuse a Gemm.

    Args:
        model: the graph, which is changed. Its initializers W become (K, N) of ``dtype``, and
            scales of the former element type are added; the places of both are unset.
        products: products of the graph, from `products_of`.
        dtype: ``int8`` or ``int4``.
    """
    by_node = {product.node: product for product in products}
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        product = by_node.get(node.output[0])
        nodes += [node] if product is None else _nodes(node, product)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    by_weight = {product.weight: product for product in products}
    tensors: list[TensorProto] = []
    for tensor in model.graph.initializer:
        product = by_weight.get(tensor.name)
        if product is None:
            tensors.append(tensor)
            continue
        tensors += [
            _outside(product.weight, product.shape, ELEMENT_TYPES[dtype].onnx),
            _outside(product.scales, product.scales_shape, tensor.data_type),
        ]
    del model.graph.initializer[:]
    model.graph.initializer.extend(tensors)
    described = [value for value in model.graph.value_info if value.name not in by_weight]
    del model.graph.value_info[:]
    model.graph.value_info.extend(described)
    for opset in model.opset_import:
        if opset.domain in ("", "ai.onnx"):
            opset.version = max(opset.version, OPSET)


def place_tensors(model: ModelProto, location: str, places: Mapping[str, tuple[int, int]]) -> None:
    """Set where initializers outside the file lie: name -> (offset, length) in ``location``."""
    for tensor in model.graph.initializer:
        if tensor.name in places:
            offset, length = places[tensor.name]
            del tensor.external_data[:]
            for key, value in (("location", location), ("offset", offset), ("length", length)):
                tensor.external_data.add(key=key, value=str(value))


def _nodes(node: NodeProto, product: Product) -> list[NodeProto]:
    weight, output = f"{product.weight}.dequantized", node.output[0]
    bias = node.input[2] if len(node.input) > 2 else ""
    result = f"{output}.product" if bias else output
    nodes = [
        helper.make_node(
            "DequantizeLinear",
            [product.weight, product.scales],
            [weight],
            axis=0,
            block_size=BLOCK,
        ),
        helper.make_node("MatMul", [node.input[0], weight], [result]),
    ]
    return [*nodes, helper.make_node("Add", [result, bias], [output])] if bias else nodes


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


def _outside(name: str, shape: tuple[int, int], data_type: int) -> TensorProto:
    return TensorProto(
        name=name, data_type=data_type, dims=shape, data_location=TensorProto.EXTERNAL
    )
