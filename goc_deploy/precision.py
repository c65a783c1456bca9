"""Element types: the one table from which every stage derives its own names.

A model has a *precision*, the short name that the command line takes (``fp32``). A tensor has a
*dtype*, which is named as in NumPy and PyTorch (``float32``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

Precision = Literal["fp32", "fp16", "bf16"]

PRECISIONS: tuple[Precision, ...] = get_args(Precision)


@dataclass(frozen=True, slots=True)
class ElementType:
    """The names of a dtype in other libraries.

    Attributes:
        nbytes: bytes of an element.
        numpy: the NumPy dtype that holds its bits; NumPy itself has no ``bfloat16``.
        onnx: number of the ``TensorProto.DataType``.
        onnx_name: name in ONNX's text format, which ONNX Runtime also writes in ``tensor(...)``.
        tensorrt: name of the ``tensorrt.DataType``.
    """

    nbytes: int
    numpy: str
    onnx: int
    onnx_name: str
    tensorrt: str


ELEMENT_TYPES: Mapping[str, ElementType] = {
    "float32": ElementType(4, "float32", 1, "float", "FLOAT"),
    "float16": ElementType(2, "float16", 10, "float16", "HALF"),
    "bfloat16": ElementType(2, "uint16", 16, "bfloat16", "BF16"),
    "int32": ElementType(4, "int32", 6, "int32", "INT32"),
    "int64": ElementType(8, "int64", 7, "int64", "INT64"),
    "uint8": ElementType(1, "uint8", 2, "uint8", "UINT8"),
}
DTYPE_OF_PRECISION: Mapping[Precision, str] = {
    "fp32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
}
DTYPE_BYTES: Mapping[str, int] = {dtype: kind.nbytes for dtype, kind in ELEMENT_TYPES.items()}
ITEM_BYTES: Mapping[Precision, int] = {
    precision: DTYPE_BYTES[dtype] for precision, dtype in DTYPE_OF_PRECISION.items()
}
