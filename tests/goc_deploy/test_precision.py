from __future__ import annotations

import numpy as np
import onnx
import onnx_ir
import pytest
import torch

from goc_deploy.precision import (
    DTYPE_BYTES,
    DTYPE_OF_PRECISION,
    ELEMENT_TYPES,
    ITEM_BYTES,
    PRECISIONS,
    tensor_bytes,
)


@pytest.mark.parametrize("dtype", ELEMENT_TYPES)
def test_the_table_has_the_names_and_sizes_of_onnx_numpy_and_torch(dtype: str) -> None:
    kind = ELEMENT_TYPES[dtype]
    assert onnx_ir.DataType(kind.onnx).itemsize * 8 == kind.bits
    assert tensor_bytes(dtype, (3, 4)) * 8 == 12 * kind.bits
    if dtype != "int4":  # NumPy and torch have no such packed values
        assert DTYPE_BYTES[dtype] * 8 == kind.bits
        assert np.dtype(kind.numpy).itemsize * 8 == kind.bits == getattr(torch, dtype).itemsize * 8
    text = f'<ir_version: 10, opset_import: ["": 20]> g ({kind.onnx_name}[1] x) => () {{}}'
    (value,) = onnx.parser.parse_model(text).graph.input
    assert value.type.tensor_type.elem_type == kind.onnx


def test_tensorrt_names_its_types_as_the_table_does() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    for kind in ELEMENT_TYPES.values():
        assert getattr(trt.DataType, kind.tensorrt).itemsize * 8 == kind.bits


def test_every_precision_has_a_dtype() -> None:
    assert PRECISIONS == tuple(DTYPE_OF_PRECISION) == tuple(ITEM_BYTES)
    assert ITEM_BYTES == {"fp32": 4, "fp16": 2, "bf16": 2}
