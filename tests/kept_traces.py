"""Graphs that torch traced, kept for all processes of one run of the tests.

The tests export the same few architectures hundreds of times, and nearly all the time of such an
export is torch's tracing. What is traced does not depend on the values of the parameters, so a
graph is found again by all that its module consists of: classes with their code, attributes,
buffers, and the shapes and dtypes of parameters and inputs. Commands that run as a user runs them,
in a process that imports torch itself, trace every graph.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import types
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch

from goc_deploy.exporters import unit_files
from goc_deploy.exporters.lowering import Template, template_from_kind
from goc_deploy.exporters.units import GraphKind
from tests.torch_registry import keep_registry
from tests.warm_commands import TRACES


def keep_traces() -> None:
    """Let exports of this process share traced graphs with those of others."""
    keep_registry()
    unit_files.template_from_kind = kept_template


def kept_template(kind: GraphKind, dtype: torch.dtype) -> Template:
    """Trace a kind of graph, or read what another export traced of such a kind.

    Without the variable ``TRACES`` every graph is traced.
    """
    folder = os.environ.get(TRACES)
    if not folder:
        return template_from_kind(kind, dtype)
    path = Path(folder, f"{digest(kind, dtype)}.onnx")
    if path.exists():
        return Template(kind, ir.from_proto(onnx.load(path)), dtype)
    template = template_from_kind(kind, dtype)
    unfinished = path.with_suffix(f".{os.getpid()}")
    onnx.save(ir.to_proto(template.model), unfinished)
    unfinished.replace(path)
    return template


def digest(kind: GraphKind, dtype: torch.dtype) -> str:
    """Name of what is traced of a kind of graph.

    Raises:
        pickle.PicklingError: the module has a function with a closure.
    """
    inputs = [(i.name, str(i.example.shape), i.example.dtype, i.dynamic) for i in kind.inputs]
    content = io.BytesIO()
    _Content(content).dump(
        (kind.kind, kind.module, inputs, kind.outputs, kind.weights_are_inputs, dtype)
    )
    return hashlib.sha256(content.getvalue()).hexdigest()


class _Content(pickle.Pickler):
    """Pickles what a trace depends on."""

    fast = True  # equal contents have equal bytes, whether or not they are the same object

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, torch.nn.Parameter):
            return str, (f"{value.shape} {value.dtype}",)
        if isinstance(value, torch.Tensor):
            values = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            return bytes, (f"{value.shape} {value.dtype} ".encode() + values,)
        if isinstance(value, types.FunctionType):
            if value.__closure__:
                raise pickle.PicklingError(f"{value.__qualname__} has a closure")
            return str, (value.__qualname__, _code(value.__code__))
        if isinstance(value, type) and issubclass(value, torch.nn.Module):
            return str, (_class(value),)
        return NotImplemented


def _class(module: type) -> str:
    """A class of modules and those that it is derived from, with their code."""
    functions = [
        (base.__qualname__, name, _code(value.__code__))
        for base in module.__mro__
        for name, value in vars(base).items()
        if isinstance(value, types.FunctionType)
    ]
    return repr((module.__module__, functions))


def _code(code: types.CodeType) -> tuple[Any, ...]:
    inner = [_code(c) if isinstance(c, types.CodeType) else repr(c) for c in code.co_consts]
    return code.co_code, code.co_names, inner
