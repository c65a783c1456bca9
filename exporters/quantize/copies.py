"""Quantising a unit that was written: the same for every architecture."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx

from goc_deploy.engine_dir.manifest import Parameter
from goc_deploy.errors import ModelError
from goc_deploy.exporters.lowering import ALIGNMENT
from goc_deploy.exporters.quantize.blocks import packed, quantized_blocks, rounded_up
from goc_deploy.exporters.quantize.products import (
    Product,
    place_tensors,
    products_of,
    quantize_products,
)
from goc_deploy.exporters.quantize.rounding import encoded
from goc_deploy.exporters.quantize.static import StaticInput
from goc_deploy.precision import (
    DTYPE_OF_FORMAT,
    DTYPE_OF_PRECISION,
    DYNAMIC_KEY,
    Precision,
    WeightFormat,
    tensor_bytes,
)
from goc_deploy.protocols import NUMPY_DTYPES, float32_from_bfloat16


def quantize_copy(
    folder: Path,
    name: str,
    parameters: Sequence[Parameter],
    precision: Precision,
    weight_format: WeightFormat,
    static: Mapping[str, StaticInput] | None = None,
) -> tuple[Parameter, ...]:
    """Replace ``NAME.onnx`` and ``NAME.weights`` by a graph with quantised weights.

    One matrix is in memory at a time. Tensors that belong to no product keep their bytes.

    Args:
        folder: folder of the files that `goc_deploy.exporters.lowering.write_copy` wrote.
        name: name of the unit.
        parameters: the parameters of these files.
        precision: precision of these parameters, and of the scales.
        weight_format: format of the quantised weights.
        static: weight -> how the other operand of its product is quantised, for a calibrated
            format.

    Returns:
        The parameters of the new files. ``W.scales`` follows a quantised ``W``, and
        ``W.input_scale`` and ``W.smoothing`` follow those.

    Raises:
        ModelError: the graph has no product that can be quantised, or a weight is not finite.
    """
    model = onnx.load(folder / f"{name}.onnx", load_external_data=False)
    products = {product.weight: product for product in checked_products(model, name, weight_format)}
    dtype = DTYPE_OF_FORMAT[weight_format]
    written: list[Parameter] = []
    temporary = folder / f"{name}.weights.tmp"
    with open(temporary, "wb") as file:
        for parameter in parameters:
            values = stored_values(folder / f"{name}.weights", parameter, precision)
            product = products.get(parameter.name)
            parts: Iterable[Part] = [(parameter.name, None, parameter.shape, values)]
            if product is not None:
                matrix = matrix_of(values, product, precision)
                parts = (
                    _by_blocks(matrix, product, precision, dtype)
                    if static is None
                    else _by_columns(matrix, product, precision, static[product.weight])
                )
            for tensor, tensor_dtype, shape, content in parts:
                written.append(_written(file, content, tensor, shape, tensor_dtype))
    os.replace(temporary, folder / f"{name}.weights")
    smoothed = (
        None
        if static is None
        else {weight: kept.factors is not None for weight, kept in static.items()}
    )
    quantize_products(model, list(products.values()), dtype, smoothed)
    places = {
        p.name: (p.offset, tensor_bytes(p.dtype or DTYPE_OF_PRECISION[precision], p.shape))
        for p in written
    }
    place_tensors(model, f"{name}.weights", places)
    if weight_format == "w8+dynamic":
        model.graph.metadata_props.add(key=DYNAMIC_KEY, value="activations")
    onnx.save_model(model, folder / f"{name}.onnx")
    onnx.checker.check_model(str(folder / f"{name}.onnx"), full_check=True)
    return tuple(written)


def checked_products(
    model: onnx.ModelProto, name: str, weight_format: WeightFormat
) -> tuple[Product, ...]:
    """Return the products of a unit that can be quantised.

    Raises:
        ModelError: there is none.
    """
    products = products_of(model)
    if not products:
        raise ModelError(
            f"unit {name} has no matrix product with constant weights that `quantize="
            f"{weight_format}` could quantise; add `quantize_exclude={name}`"
        )
    return products


def stored_values(path: Path, parameter: Parameter, precision: Precision) -> np.ndarray:
    """Map a parameter; it has its shape, and uint16 holds ``bfloat16`` values."""
    dtype = NUMPY_DTYPES[DTYPE_OF_PRECISION[precision]]
    return np.memmap(path, dtype, "r", parameter.offset, parameter.shape)


def matrix_of(values: np.ndarray, product: Product, precision: Precision) -> np.ndarray:
    """Return the weight (K, N) of a product in float32."""
    matrix = values.T if product.transposed else values
    return float32_from_bfloat16(matrix) if precision == "bf16" else matrix.astype(np.float32)


Part = tuple[str, str | None, tuple[int, ...], np.ndarray]  # name, dtype, shape, stored values


def _by_blocks(
    matrix: np.ndarray, product: Product, precision: Precision, dtype: str
) -> Iterator[Part]:
    try:
        integers, scales = quantized_blocks(matrix, dtype, DTYPE_OF_PRECISION[precision])
    except ModelError as cause:
        raise ModelError(f"{product.weight}: {cause}") from cause
    yield product.weight, dtype, product.shape, packed(integers, dtype)
    yield product.scales, None, product.scales_shape, scales


def _by_columns(
    matrix: np.ndarray, product: Product, precision: Precision, static: StaticInput
) -> Iterator[Part]:
    values, scales = static.quantized(matrix)
    dtype, factors = DTYPE_OF_PRECISION[precision], static.factors
    yield product.weight, static.values, product.shape, encoded(values, static.values)
    yield product.scales, None, scales.shape, scales
    yield product.input_scale, None, (), rounded_up(np.array(static.scale), dtype)
    if factors is not None:
        yield product.smoothing, None, factors.shape, rounded_up(factors, dtype)


def _written(
    file: BinaryIO, values: np.ndarray, name: str, shape: tuple[int, ...], dtype: str | None
) -> Parameter:
    file.write(b"\0" * (-file.tell() % ALIGNMENT))
    offset = file.tell()
    file.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
    return Parameter(name, offset, shape, dtype)
