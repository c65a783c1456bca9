"""Element types: the one table from which every stage derives its own names.

A model has a *precision*, the short name that the command line takes (``fp32``). A tensor has a
*dtype*, which is named as in NumPy and PyTorch (``float32``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Precision = Literal["fp32", "fp16", "bf16"]

PRECISIONS: tuple[Precision, ...] = get_args(Precision)
# w8 and w4 are formats of weights, computed with in the precision; w8+dynamic lets ONNX Runtime
# round activations while it runs; int8 and fp8 quantise them with ranges that are calibrated.
WeightFormat = Literal["w8", "w8+dynamic", "w4", "int8", "int8+smooth", "fp8"]
WEIGHT_FORMATS: tuple[WeightFormat, ...] = get_args(WeightFormat)
CALIBRATED_FORMATS: tuple[WeightFormat, ...] = ("int8", "int8+smooth", "fp8")
DTYPE_OF_FORMAT: Mapping[WeightFormat, str] = {
    "w8": "int8",
    "w8+dynamic": "int8",
    "w4": "int4",
    "int8": "int8",
    "int8+smooth": "int8",
    "fp8": "float8_e4m3fn",
}
DYNAMIC_KEY = "goc.dynamic"  # metadata of a graph in w8+dynamic


@dataclass(frozen=True, slots=True)
class ElementType:
    """The names of a dtype in other libraries.

    Attributes:
        bits: bits of an element. Elements of 4 bits lie two in a byte, the first in the low half.
        numpy: the NumPy dtype that holds its bits; NumPy has no ``bfloat16``, ``int4`` and float8.
        onnx: number of the ``TensorProto.DataType``.
        onnx_name: name in ONNX's text format, which ONNX Runtime also writes in ``tensor(...)``.
        tensorrt: name of the ``tensorrt.DataType``.
    """

    bits: int
    numpy: str
    onnx: int
    onnx_name: str
    tensorrt: str


ELEMENT_TYPES: Mapping[str, ElementType] = {
    "float32": ElementType(32, "float32", 1, "float", "FLOAT"),
    "float16": ElementType(16, "float16", 10, "float16", "HALF"),
    "bfloat16": ElementType(16, "uint16", 16, "bfloat16", "BF16"),
    "int32": ElementType(32, "int32", 6, "int32", "INT32"),
    "int64": ElementType(64, "int64", 7, "int64", "INT64"),
    "uint8": ElementType(8, "uint8", 2, "uint8", "UINT8"),
    "int8": ElementType(8, "int8", 3, "int8", "INT8"),
    "int4": ElementType(4, "uint8", 22, "int4", "INT4"),
    "float8_e4m3fn": ElementType(8, "uint8", 17, "float8e4m3fn", "FP8"),
}
DTYPE_OF_PRECISION: Mapping[Precision, str] = {
    "fp32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
}
DTYPE_BYTES: Mapping[str, int] = {
    dtype: kind.bits // 8 for dtype, kind in ELEMENT_TYPES.items() if kind.bits >= 8
}
ITEM_BYTES: Mapping[Precision, int] = {
    precision: DTYPE_BYTES[dtype] for precision, dtype in DTYPE_OF_PRECISION.items()
}


def tensor_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Return the size of a contiguous tensor in bytes; half a byte at its end is a byte."""
    return -(-math.prod(shape) * ELEMENT_TYPES[dtype].bits // 8)
