"""Products of quantised values in the form that TensorRT turns into products of 8 bits."""

from __future__ import annotations

from typing import Any

# What 1 of the quantised values stands for: all values are below 1, so sums fit into float16.
_UNITS = {3: 2.0**-7, 17: 2.0**-9}  # ONNX element type of int8 and float8_e4m3fn
_UNIT, _INVERSE = "quantized.unit", "quantized.inverse"


def use_constant_scales(model: Any) -> int:
    """Let products of quantised values have the same constant scale, and scale their results.

    ::

        input       = QuantizeLinear(x, input_scale, zero_point)
        rounded     = DequantizeLinear(input, input_scale, zero_point)
        dequantized = DequantizeLinear<axis=1>(W, scales)
        y           = MatMul(rounded, dequantized)

    becomes, with the constants ``unit`` and ``inverse`` = 1 / ``unit``::

        input_steps = input_scale * inverse
        input       = QuantizeLinear(x / input_steps, unit, zero_point)
        rounded     = DequantizeLinear(input, unit, zero_point)
        dequantized = DequantizeLinear(W, unit)
        y           = MatMul(rounded, dequantized) * (input_steps * (scales * inverse))

    TensorRT for RTX 1.7 otherwise dequantises both operands and multiplies floats in two cases: if
    the scales are inputs, as with shared weights, and if the columns of y are cut apart, as for
    queries, keys and values.

    Args:
        model: the ONNX graph, which is changed. Its weights may be initializers or inputs.

    Returns:
        The number of products.
    """
    made: dict[str, Any] = {output: node for node in model.graph.node for output in node.output}
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    types |= {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    replaced: dict[str, list[Any]] = {}  # output of a node -> what takes its place
    constants: dict[str, Any] = {}
    for node in model.graph.node:
        if node.op_type != "MatMul":
            continue
        parts: list[Any] = [made.get(name) for name in node.input]
        rounded, weight = parts
        quantized: Any = made.get(rounded.input[0]) if _is(rounded, "DequantizeLinear") else None
        if not _is(quantized, "QuantizeLinear") or not _is(weight, "DequantizeLinear"):
            continue
        kinds = types[weight.input[0]], types[weight.input[1]]
        unit = _constant(_UNIT, _UNITS[kinds[0]], kinds, constants)
        inverse = _constant(_INVERSE, 1 / _UNITS[kinds[0]], kinds, constants)
        replaced |= {part.output[0]: [] for part in (quantized, rounded, weight)}
        replaced[node.output[0]] = _scaled(node, (quantized, rounded, weight), unit, inverse)
    nodes = [kept for node in model.graph.node for kept in replaced.get(node.output[0], [node])]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(constants.values())
    return len(replaced) // 4


def _scaled(product: Any, parts: tuple[Any, Any, Any], unit: str, inverse: str) -> list[Any]:
    from onnx import helper

    quantized, _, weight = parts
    x, input_scale, zero_point = quantized.input
    y, scales = product.output[0], weight.input[1]
    names = ("input_steps", "scaled", "exact", "column_steps", "steps")
    input_steps, scaled, exact, column_steps, steps = (f"{y}.{name}" for name in names)
    source, operand, values = (part.output[0] for part in parts)
    return [
        helper.make_node("Mul", [input_scale, inverse], [input_steps]),
        helper.make_node("Div", [x, input_steps], [scaled]),
        helper.make_node("QuantizeLinear", [scaled, unit, zero_point], [source]),
        helper.make_node("DequantizeLinear", [source, unit, zero_point], [operand]),
        helper.make_node("DequantizeLinear", [weight.input[0], unit], [values]),
        helper.make_node("MatMul", [operand, values], [exact]),
        helper.make_node("Mul", [scales, inverse], [column_steps]),
        helper.make_node("Mul", [input_steps, column_steps], [steps]),
        helper.make_node("Mul", [exact, steps], [y]),
    ]


def _constant(name: str, value: float, kinds: tuple[int, int], constants: dict[str, Any]) -> str:
    """Add a scalar for weights and scales of these element types, and return its name."""
    from onnx import helper

    name = f"{name}.{kinds[0]}.{kinds[1]}"
    if name not in constants:
        constants[name] = helper.make_tensor(name, kinds[1], [], [value])
    return name


def _is(node: Any, operator: str) -> bool:
    return node is not None and node.op_type == operator
