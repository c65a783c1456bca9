"""The modulation of all steps of a plan, evaluated before it runs.

If the graph ``conditioning`` reads nothing but timesteps, its output for the steps of a plan is a
constant. With that constant in the engine directory, its weights need not be loaded: 6.8 of the
20.4 billion parameters of a Qwen-Image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper
from onnx.utils import Extractor

from goc_deploy.compiler import Plan
from goc_deploy.compiler.modulation_file import (
    steps_by_graph,
    table_key,
    table_to_safetensors,
)
from goc_deploy.engine_dir.manifest import GraphEntry, Manifest, Parameter
from goc_deploy.errors import EngineDirError
from goc_deploy.exporters.widening import widen_graph, widened_buffer
from goc_deploy.host_memory import return_free_pages
from goc_deploy.modulation import TABLE_BUDGET_BYTES
from goc_deploy.precision import DTYPE_BYTES, DTYPE_OF_PRECISION, tensor_bytes
from goc_deploy.protocols import (
    NUMPY_DTYPES,
    Backend,
    Buffer,
    Engine,
    mapped_buffer,
    stored_values,
)

TIMESTEPS, TABLE = "timesteps", "table"
PART_BYTES = 256 * 2**20  # of a weight in float32 that is read at a time
_DEFAULTS = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0}  # of Gemm
_TRANSPOSED = {**_DEFAULTS, "transB": 1}

Read = Callable[[str], memoryview]


def write_table(
    folder: Path,
    plan: Plan,
    manifest: Manifest,
    read: Read,
    make_backend: Callable[[], Backend],
) -> Manifest:
    """Write the modulation table of a plan, if it may replace the graph that computes it.

    It does if that graph reads nothing but timesteps, and if the table is smaller than the weights
    of the graph and within ``TABLE_BUDGET_BYTES``. Plans of the same timesteps share a table.

    Args:
        folder: folder to write to; it has a folder ``plans``.
        plan: the plan.
        manifest: manifest of the engine directory.
        read: returns the content of a file of the engine directory.
        make_backend: makes the backend that runs the graph.

    Returns:
        The manifest with the table; its list of files is unchanged.

    Raises:
        EngineDirError: the graph or its weights are missing or corrupt.
    """
    key = table_key(plan)
    units = {unit.name: unit for unit in manifest.graphs}
    graphs = [(units[name], steps) for name, steps in steps_by_graph(plan).items()]
    dtype = DTYPE_OF_PRECISION[manifest.precision]
    shape = (plan.steps, manifest.model.modulation.count, manifest.model.hidden)
    nbytes, weights = tensor_bytes(dtype, shape), sum(_weight_bytes(unit) for unit, _ in graphs)
    if key in manifest.tables or nbytes > TABLE_BUDGET_BYTES or nbytes >= weights:
        return manifest
    table = np.empty(shape, NUMPY_DTYPES[dtype])
    for unit, steps in graphs:
        told = [plan.sampler.timesteps[step] for step in steps]
        try:
            model = onnx.load_model_from_string(bytes(read(unit.onnx)))
            if not _reads_timesteps_only(model, unit):
                return manifest
            content = read(str(unit.weights_file))
        except EngineDirError as cause:
            raise EngineDirError(
                f"plan {plan.name} needs the modulation of its timesteps, which no other plan has, "
                f"and the graph that computes it: {cause}"
            ) from cause
        evaluation = _Evaluation(model, unit, content, make_backend())
        rows = evaluation.table(np.array(told, np.float32), *shape[1:])
        table[steps.start : steps.stop] = stored_values(rows, dtype)
    path = f"plans/modulation_{key[:12]}.safetensors"
    (folder / path).write_bytes(table_to_safetensors(table, dtype))
    return replace(manifest, tables={**manifest.tables, key: path})


def _weight_bytes(unit: GraphEntry) -> int:
    return sum(tensor_bytes(unit.dtype(p), p.shape) for p in unit.parameters)


def _reads_timesteps_only(model: onnx.ModelProto, unit: GraphEntry) -> bool:
    """Whether the inputs of a graph are the timesteps and its weights."""
    weights = {p.name for p in unit.parameters} if unit.weights_are_inputs else set()
    return {value.name for value in model.graph.input} - weights == {TIMESTEPS}


@dataclass(frozen=True, slots=True)
class _Product:
    """A ``Gemm`` of a computed tensor (S, K) and a large weight (N, K), evaluated by parts of N.

    Attributes:
        source: name of the tensor.
        result: name of the product (S, N).
        weight: the weight.
        bias: its bias (N,), or None without one.
    """

    source: str
    result: str
    weight: Parameter
    bias: Parameter | None


class _Evaluation:
    """The evaluation of a graph whose weights are inputs, with a bounded part of them in memory.

    All tensors are float32 until the table is rounded to the precision.

    Args:
        model: the graph, which is changed if it is not float32.
        unit: its entry.
        content: the content of its weights file.
        backend: runs the graph.
    """

    def __init__(
        self, model: onnx.ModelProto, unit: GraphEntry, content: memoryview, backend: Backend
    ) -> None:
        self._dtype = DTYPE_OF_PRECISION[unit.precision]
        if self._dtype != "float32":
            widen_graph(model, content, self._dtype)
        self._parts = Extractor(model)
        self._content, self._backend = content, backend
        self._weights = {p.name: p for p in unit.parameters}
        self._products = tuple(self._large_products(model))

    def table(self, timesteps: np.ndarray, rows: int, hidden: int) -> np.ndarray:
        """The table (S, M, D) float32 of timesteps (S,)."""
        given = {TIMESTEPS: timesteps}
        for product in self._products:
            width = product.weight.shape[1]
            source = self._run(given, product.source, (len(timesteps), width))
            given[product.result] = self._multiplied(source, product)
        return self._run(given, TABLE, (len(timesteps), rows, 1, hidden))[:, :, 0]

    def _large_products(self, model: onnx.ModelProto) -> Iterator[_Product]:
        for node in model.graph.node:
            operands = [self._weights.get(name) for name in node.input]
            attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            if node.op_type != "Gemm" or {**_DEFAULTS, **attributes} != _TRANSPOSED:
                continue
            source, weight, *bias = operands
            if source is not None or weight is None or None in bias:
                continue
            if 4 * math.prod(weight.shape) > PART_BYTES:
                yield _Product(node.input[0], node.output[0], weight, next(iter(bias), None))

    def _run(
        self, given: Mapping[str, np.ndarray], output: str, shape: Sequence[int]
    ) -> np.ndarray:
        """Run the part of the graph between tensors and an output."""
        model = self._parts.extract_model([*given, *self._weights], [output])
        read = {name for node in model.graph.node for name in node.input}
        unread = [value for value in model.graph.input if value.name not in read]
        for value in unread:
            model.graph.input.remove(value)
        weights = {
            name: self._rows(p, 0, p.shape[0]) for name, p in self._weights.items() if name in read
        }
        engine = self._loaded(model, weights)
        inputs = {name: self._uploaded(v) for name, v in given.items() if name in read}
        result = self._backend.allocate(tuple(shape), engine.dtypes[output])
        engine.bind(inputs, {output: result})()
        return self._backend.download(result)

    def _multiplied(self, source: np.ndarray, product: _Product) -> np.ndarray:
        """The product (S, N), with ``PART_BYTES`` of the weight in float32 at a time."""
        rows, width = product.weight.shape
        names = ("a", "b") if product.bias is None else ("a", "b", "c")
        engine = self._loaded(_gemm(names), {})
        given, product_rows = self._uploaded(source), np.empty((len(source), rows), np.float32)
        part = max(1, PART_BYTES // (4 * width))
        for start in range(0, rows, part):
            stop = min(start + part, rows)
            inputs = {"a": given, "b": self._rows(product.weight, start, stop)}
            if product.bias is not None:
                inputs["c"] = self._rows(product.bias, start, stop)
            result = self._backend.allocate((len(source), stop - start), "float32")
            engine.bind(inputs, {"y": result})()
            product_rows[:, start:stop] = self._backend.download(result)
            return_free_pages([self._content])
        return product_rows

    def _rows(self, p: Parameter, start: int, stop: int) -> Buffer:
        """Rows of a weight, viewed in the file, or widened."""
        shape = (stop - start, *p.shape[1:])
        skipped = start * math.prod(p.shape[1:]) * DTYPE_BYTES[self._dtype]
        rows = replace(p, offset=p.offset + skipped, shape=shape)
        if self._dtype != "float32":
            return widened_buffer(self._content, rows, self._dtype)
        return mapped_buffer(self._content, rows.offset, shape, self._dtype)

    def _uploaded(self, values: np.ndarray) -> Buffer:
        buffer = self._backend.allocate(values.shape, "float32")
        self._backend.upload(values, buffer)
        return buffer

    def _loaded(self, model: onnx.ModelProto, weights: Mapping[str, Buffer]) -> Engine:
        content = memoryview(model.SerializeToString())
        return self._backend.load(content, {}, weights, runs_once=True)


def _gemm(names: Sequence[str]) -> onnx.ModelProto:
    """A graph of one product in float32, ``y = a @ b.T + c``."""
    kind = TensorProto.FLOAT
    shapes = {"a": ("steps", "width"), "b": ("rows", "width"), "c": ("rows",)}
    inputs = [helper.make_tensor_value_info(name, kind, shapes[name]) for name in names]
    output = helper.make_tensor_value_info("y", kind, ("steps", "rows"))
    node = helper.make_node("Gemm", names, ["y"], transB=1)
    graph = helper.make_graph([node], "product", inputs, [output])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
