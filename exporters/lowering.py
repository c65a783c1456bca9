"""PyTorch modules to ONNX: one trace per kind of graph, one file per copy.

A template is the traced graph. The parameters of every copy become external data in the weights
file of that copy, in the layout of the checkpoint: linear layers become Gemm with transB=1, so
weights are stored without transposition.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn

from goc_deploy.engine_dir.manifest import Parameter
from goc_deploy.errors import VerificationError
from goc_deploy.exporters.units import DTYPES, Binding, GraphKind
from goc_deploy.precision import DTYPE_OF_PRECISION, ELEMENT_TYPES

OPSET = 20
ALIGNMENT = 4096  # the size of a memory page, so that weights can be mapped
IR_TYPES = {
    DTYPES[precision]: ir.DataType(ELEMENT_TYPES[dtype].onnx)
    for precision, dtype in DTYPE_OF_PRECISION.items()
}


@dataclass(frozen=True, slots=True)
class Template:
    """A traced kind of graph.

    Attributes:
        kind: the kind that was traced.
        model: the graph; the values of its parameters do not matter.
        dtype: dtype of the parameters.
    """

    kind: GraphKind
    model: ir.Model
    dtype: torch.dtype


def template_from_kind(kind: GraphKind, dtype: torch.dtype) -> Template:
    """Trace a kind of graph.

    Raises:
        VerificationError: the graph lacks a parameter, so weights could not be bound.
    """
    symbols = _dimensions({symbol for i in kind.inputs for symbol in i.dynamic.values()})
    with _quiet():
        program = torch.onnx.export(
            kind.module,
            tuple(i.example for i in kind.inputs),
            dynamo=True,
            input_names=[i.name for i in kind.inputs],
            output_names=list(kind.outputs),
            dynamic_shapes=_as_arguments(
                kind.module,
                [{dim: symbols[symbol] for dim, symbol in i.dynamic.items()} for i in kind.inputs],
            ),
            opset_version=OPSET,
            verbose=False,
        )
    if program is None:
        raise VerificationError(
            f"unit kind {kind.kind}: torch.onnx returned no graph; use the torch version in "
            "constraints.txt"
        )
    lost = sorted(
        {name for name, _ in kind.module.named_parameters()}
        - program.model.graph.initializers.keys()
    )
    if lost:
        raise VerificationError(
            f"unit kind {kind.kind}: the ONNX exporter folded {', '.join(lost)} away; use the "
            "torch and onnxscript versions in constraints.txt"
        )
    program.model.graph.metadata_props.clear()
    for node in program.model.graph:
        node.metadata_props.clear()  # source paths of the exporting machine
    _rename_apart(program.model.graph)
    if kind.weights_are_inputs:
        for name, _ in kind.module.named_parameters():
            program.model.graph.inputs.append(program.model.graph.initializers.pop(name))
    return Template(kind, program.model, dtype)


def _rename_apart(graph: ir.Graph) -> None:
    """Rename values that the graph computes and that have the name of one of its inputs.

    torch names the computed values before inputs get their names, so that a unit with an input
    ``cos`` may also compute a ``cos``.
    """
    names = {value.name for value in graph.inputs}
    for number, node in enumerate(graph):
        for value in node.outputs:
            if value.name in names:
                value.name = f"{value.name}_of_node_{number}"


def _as_arguments(module: nn.Module, values: Sequence[Any]) -> tuple[Any, ...]:
    """Values of the graph's inputs, nested as torch.export wants them for ``*args``."""
    parameters = list(inspect.signature(module.forward).parameters.values())
    if parameters[-1].kind is not inspect.Parameter.VAR_POSITIONAL:
        return tuple(values)
    named = len(parameters) - 1
    if len(values) == named:
        return tuple(values)
    return (*values[:named], tuple(values[named:]))


def _dimensions(symbols: Collection[str]) -> dict[str, Any]:
    """The dimensions of torch by symbol, multiples such as ``2*height`` included."""
    names = {symbol.rpartition("*")[2] for symbol in symbols}
    plain = {name: torch.export.Dim(name, min=1, max=1 << 20) for name in names}
    return {
        symbol: int(symbol.rpartition("*")[0] or 1) * plain[symbol.rpartition("*")[2]]
        if "*" in symbol
        else plain[symbol]
        for symbol in symbols
    }


def write_copy(
    template: Template, name: str, tensors: Mapping[str, Tensor], folder: Path
) -> tuple[Parameter, ...]:
    """Write ``NAME.onnx`` and ``NAME.weights`` for one copy of a kind of graph.

    Args:
        template: the traced kind.
        name: name of the copy, a key of ``template.kind.copies``.
        tensors: the tensors of the checkpoint.
        folder: folder to write to.

    Returns:
        Names, offsets and shapes of the parameters in the weights file.
    """
    binding, parameters = template.kind.copies[name], []
    initializers = template.model.graph.initializers
    with open(folder / f"{name}.weights", "wb") as file:
        for parameter, module_value in template.kind.module.named_parameters():
            file.write(b"\0" * (-file.tell() % ALIGNMENT))
            offset = file.tell()
            _write_rows(file, binding, parameter, tensors, template.dtype)
            if parameter in initializers:
                initializers[parameter].const_value = ir.ExternalTensor(
                    location=f"{name}.weights",
                    offset=offset,
                    length=file.tell() - offset,
                    dtype=IR_TYPES[template.dtype],
                    shape=ir.Shape(module_value.shape),
                    name=parameter,
                    base_dir=folder,
                )
            parameters.append(Parameter(parameter, offset, tuple(module_value.shape)))
    template.model.graph.name = name
    onnx.save_model(ir.to_proto(template.model), folder / f"{name}.onnx")
    onnx.checker.check_model(str(folder / f"{name}.onnx"))
    return tuple(parameters)


def _write_rows(
    file: BinaryIO,
    binding: Binding,
    parameter: str,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> None:
    for slab in binding[parameter]:
        rows = slab.read(tensors, dtype)
        file.write(rows.reshape(-1).view(torch.uint8).numpy().data)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the messages of torch.onnx about optional packages out of the user's terminal."""
    loggers = [
        logging.getLogger("torch.onnx"),
        logging.getLogger("torch.export"),
        logging.getLogger("onnxscript"),
        logging.getLogger("onnx_ir"),
    ]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(None):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
