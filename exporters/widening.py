"""Graphs and weights of 16 bits as float32, for exact evaluation on the CPU.

ONNX Runtime has no bf16 kernels there, and rounds in fp16 where it happens to convert.
"""

from __future__ import annotations

import numpy as np
import onnx

from goc_deploy.engine_dir.manifest import Parameter
from goc_deploy.precision import ELEMENT_TYPES, tensor_bytes
from goc_deploy.protocols import NUMPY_DTYPES, Buffer, float32_from_bfloat16, mapped_buffer


def _float32(content: memoryview, dtype: str) -> np.ndarray:
    """The values of a tensor ``bfloat16`` or ``float16``."""
    values = np.frombuffer(content, NUMPY_DTYPES[dtype])
    return float32_from_bfloat16(values) if dtype == "bfloat16" else values.astype(np.float32)


def widened_buffer(weights: memoryview, p: Parameter, dtype: str) -> Buffer:
    """A parameter of 16 bits in the content of a weights file as float32."""
    content = weights[p.offset : p.offset + tensor_bytes(dtype, p.shape)]
    return mapped_buffer(_float32(content, dtype).data, 0, p.shape, "float32")


def widen_graph(model: onnx.ModelProto, weights: memoryview, dtype: str) -> None:
    """Convert every tensor of a dtype of 16 bits to float32, those in the weights file too."""
    narrow, fp32 = ELEMENT_TYPES[dtype].onnx, onnx.TensorProto.FLOAT
    for initializer in model.graph.initializer:
        if initializer.data_type == narrow:
            if initializer.data_location == onnx.TensorProto.EXTERNAL:
                place = {entry.key: entry.value for entry in initializer.external_data}
                start, length = int(place["offset"]), int(place["length"])
                values = _float32(weights[start : start + length], dtype).reshape(initializer.dims)
            else:
                values = onnx.numpy_helper.to_array(initializer).astype(np.float32)
            initializer.CopyFrom(onnx.numpy_helper.from_array(values, initializer.name))
    for value in [*model.graph.input, *model.graph.output, *model.graph.value_info]:
        if value.type.tensor_type.elem_type == narrow:
            value.type.tensor_type.elem_type = fp32
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == narrow:
                attribute.i = fp32
