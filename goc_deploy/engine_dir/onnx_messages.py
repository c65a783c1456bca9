"""ONNX files without the package ``onnx``: messages for protobuf, which onnxruntime depends on.

The messages have only the fields that our graphs may have, under their names and numbers in ONNX
IR 10 to 13. The following is left out on purpose: subgraphs, sparse tensors, training, types other
than tensors, and references to attributes of functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

_PACKAGE = "goc_deploy.onnx"
_SCALARS = {
    "int": "TYPE_INT64",
    "text": "TYPE_STRING",
    "bytes": "TYPE_BYTES",
    "float": "TYPE_FLOAT",
}

_TYPES = descriptor_pb2.FieldDescriptorProto.Type
_LABELS = descriptor_pb2.FieldDescriptorProto.Label

Fields = Mapping[str, tuple[int, str]]

# message -> field -> (number, type); ``*`` is repeated
SCHEMA: Mapping[str, Fields] = {
    "ModelProto": {
        "ir_version": (1, "int"),
        "producer_name": (2, "text"),
        "producer_version": (3, "text"),
        "doc_string": (6, "text"),
        "graph": (7, "GraphProto"),
        "opset_import": (8, "OperatorSetIdProto*"),
        "functions": (25, "FunctionProto*"),
    },
    "OperatorSetIdProto": {"domain": (1, "text"), "version": (2, "int")},
    "GraphProto": {
        "node": (1, "NodeProto*"),
        "name": (2, "text"),
        "initializer": (5, "TensorProto*"),
        "doc_string": (10, "text"),
        "input": (11, "ValueInfoProto*"),
        "output": (12, "ValueInfoProto*"),
        "value_info": (13, "ValueInfoProto*"),
        "metadata_props": (16, "StringStringEntryProto*"),
    },
    "NodeProto": {
        "input": (1, "text*"),
        "output": (2, "text*"),
        "name": (3, "text"),
        "op_type": (4, "text"),
        "attribute": (5, "AttributeProto*"),
        "doc_string": (6, "text"),
        "domain": (7, "text"),
        "metadata_props": (9, "StringStringEntryProto*"),
    },
    "AttributeProto": {
        "name": (1, "text"),
        "f": (2, "float"),
        "i": (3, "int"),
        "s": (4, "bytes"),
        "t": (5, "TensorProto"),
        "floats": (7, "float*"),
        "ints": (8, "int*"),
        "strings": (9, "bytes*"),
        "doc_string": (13, "text"),
        "type": (20, "int"),
    },
    "TensorProto": {
        "dims": (1, "int*"),
        "data_type": (2, "int"),
        "float_data": (4, "float*"),
        "int32_data": (5, "int*"),
        "int64_data": (7, "int*"),
        "name": (8, "text"),
        "raw_data": (9, "bytes"),
        "doc_string": (12, "text"),
        "external_data": (13, "StringStringEntryProto*"),
        "data_location": (14, "int"),
        "metadata_props": (16, "StringStringEntryProto*"),
    },
    "FunctionProto": {
        "name": (1, "text"),
        "input": (4, "text*"),
        "output": (5, "text*"),
        "node": (7, "NodeProto*"),
        "doc_string": (8, "text"),
        "opset_import": (9, "OperatorSetIdProto*"),
        "domain": (10, "text"),
        "value_info": (12, "ValueInfoProto*"),
        "metadata_props": (14, "StringStringEntryProto*"),
    },
    "ValueInfoProto": {
        "name": (1, "text"),
        "type": (2, "TypeProto"),
        "doc_string": (3, "text"),
        "metadata_props": (4, "StringStringEntryProto*"),
    },
    "TypeProto": {"tensor_type": (1, "Tensor"), "denotation": (6, "text")},
    "Tensor": {"elem_type": (1, "int"), "shape": (2, "TensorShapeProto")},
    "TensorShapeProto": {"dim": (1, "Dimension*")},
    "Dimension": {"dim_value": (1, "int"), "dim_param": (2, "text"), "denotation": (3, "text")},
    "StringStringEntryProto": {"key": (1, "text"), "value": (2, "text")},
}


@cache
def _message_class(name: str) -> Any:
    """Build a class from ``SCHEMA``, in its own pool: the process may have ``onnx`` loaded too."""
    file = descriptor_pb2.FileDescriptorProto(
        name="goc_deploy/onnx.proto", package=_PACKAGE, syntax="proto3"
    )
    for message, fields in SCHEMA.items():
        described = file.message_type.add(name=message)
        for field, (number, kind) in fields.items():
            element = kind.removesuffix("*")
            label = "LABEL_REPEATED" if kind.endswith("*") else "LABEL_OPTIONAL"
            added = described.field.add(name=field, number=number, label=_LABELS.Value(label))
            added.type = _TYPES.Value(_SCALARS.get(element, "TYPE_MESSAGE"))
            if element not in _SCALARS:
                added.type_name = f".{_PACKAGE}.{element}"
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{name}"))


def model_from_bytes(content: bytes) -> Any:
    """Parse a ``ModelProto``.

    Raises:
        ValueError: the content is no ONNX file, or has a field that ``SCHEMA`` does not have.
    """
    model = _message_class("ModelProto")()
    try:
        model.ParseFromString(content)
    except DecodeError as cause:
        raise ValueError("it is no ONNX file") from cause
    size = model.ByteSize()
    model.DiscardUnknownFields()
    if model.ByteSize() != size:
        raise ValueError("it has a subgraph or another part that graphs of goc_deploy do not have")
    return model
