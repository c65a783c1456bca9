"""Comparison of TensorRT engines with ONNX Runtime on the CPU, on the same random inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.engine_dir.keys import dimension_ranges
from goc_deploy.engine_dir.manifest import GraphEntry
from goc_deploy.engine_dir.weights import mapped_parts
from goc_deploy.engines.tensorrt.backend import TensorrtBackend
from goc_deploy.engines.tensorrt.graphs import model_from_bytes
from goc_deploy.errors import UsageError, VerificationError
from goc_deploy.metrics.paired import whole_relative_l2
from goc_deploy.options import Progress
from goc_deploy.precision import ELEMENT_TYPES
from goc_deploy.protocols import NUMPY_DTYPES, Backend

# Largest relative L2 error of an output that another order of sums may cause.
TOLERANCE = {"fp32": 1e-3, "fp16": 2e-2}
IMAGES = 2
_DTYPES = {kind.onnx: dtype for dtype, kind in ELEMENT_TYPES.items()}


@dataclass(frozen=True, slots=True)
class Difference:
    """The largest relative L2 difference over the outputs of a unit."""

    unit: str
    relative_l2: float


def verify_engines(
    directory: EngineDir, backend: TensorrtBackend, reference: Backend, progress: Progress
) -> list[Difference]:
    """Run every graph that has an engine on both backends, and compare the outputs.

    Args:
        directory: the engine directory.
        backend: the backend to verify.
        reference: ONNX Runtime on the CPU.
        progress: called with (name, done, total).

    Returns:
        One difference per graph, in the order of the manifest.

    Raises:
        VerificationError: a difference is beyond ``TOLERANCE``.
        UsageError: the precision is bf16, which the reference cannot run.
        EngineDirError, SafetyError: the directory is corrupt.
    """
    precision = directory.manifest.precision
    if precision not in TOLERANCE:
        raise UsageError(
            f"{directory.path} is {precision}, for which ONNX Runtime has no CPU kernels to verify "
            "with; export with `precision=fp32` or fp16"
        )
    graphs, differences = list(_graphs(directory, backend)), []
    for index, unit in enumerate(graphs):
        progress(f"verifying {unit.name}", index, len(graphs))
        expected, outputs = (_outputs(directory, unit, one) for one in (reference, backend))
        difference = Difference(
            unit.name, max(whole_relative_l2(outputs[name], expected[name]) for name in expected)
        )
        if not difference.relative_l2 <= TOLERANCE[precision]:
            raise VerificationError(
                f"unit {unit.name}: {backend.name} differs from ONNX Runtime by "
                f"{difference.relative_l2:.2e} relative L2, allowed are {TOLERANCE[precision]:.0e};"
                " see docs/gpu.md on looking at one unit with Polygraphy"
            )
        differences.append(difference)
    progress("done", len(graphs), len(graphs))
    return differences


def _graphs(directory: EngineDir, backend: TensorrtBackend) -> Iterator[GraphEntry]:
    for unit in directory.manifest.all_graphs():
        if directory.sha256(unit.onnx) in backend.graphs:
            yield unit


def _outputs(directory: EngineDir, unit: GraphEntry, backend: Backend) -> dict[str, np.ndarray]:
    """Return all outputs of a graph on inputs that depend on its name alone."""
    manifest, onnx = directory.manifest, directory.read(unit.onnx)
    parts = manifest.parts(unit)
    weights = {
        part.weights_file: directory.read(part.weights_file)
        for part in parts.values()
        if part.weights_file
    }
    initializers, fixed = mapped_parts(parts, weights)
    engine = backend.load(onnx, initializers, fixed, runs_once=True)
    graph = model_from_bytes(onnx, f"{directory.path / unit.onnx}").graph
    images = min(IMAGES, manifest.max_batch)
    ranges = dimension_ranges(manifest.model, images, 1, manifest.video_tile)
    sizes = {symbol: high for symbol, (_, _, high) in ranges.items()}
    rng = np.random.default_rng(len(unit.name))
    inputs = {}
    for value in graph.input:
        if value.name not in fixed:
            inputs[value.name] = _filled(
                backend, _shape(value, sizes), _DTYPES[_kind(value)], images, rng
            )
    outputs = {
        value.name: backend.allocate(_shape(value, sizes), _DTYPES[_kind(value)])
        for value in graph.output
    }
    # A stream for each graph: its scratch memory is that of the engines loaded so far.
    stream = backend.device.stream()
    engine.bind(inputs, outputs, stream)()
    stream.wait()
    return {name: backend.download(buffer) for name, buffer in outputs.items()}


def _filled(
    backend: Backend, shape: tuple[int, ...], dtype: str, images: int, rng: np.random.Generator
) -> Any:
    """Upload image indices if the dtype is int64, otherwise normal values."""
    count = int(np.prod(shape))
    values = np.arange(count) % images if dtype == "int64" else rng.standard_normal(count)
    buffer = backend.allocate(shape, dtype)
    backend.upload(values.reshape(shape).astype(NUMPY_DTYPES[dtype]), buffer)
    return buffer


def _kind(value: Any) -> int:
    return int(value.type.tensor_type.elem_type)


def _shape(value: Any, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Return the dimensions with numbers for their symbols, also in products (``256*batch``)."""
    dimensions = []
    for dimension in value.type.tensor_type.shape.dim:
        factors = (
            dimension.dim_param.split("*") if dimension.dim_param else [str(dimension.dim_value)]
        )
        dimensions.append(
            int(np.prod([int(f) if f.strip().isdigit() else sizes[f.strip()] for f in factors]))
        )
    return tuple(dimensions)
