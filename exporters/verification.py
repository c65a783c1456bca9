"""Comparing exported graphs with PyTorch."""

from __future__ import annotations

import math
import mmap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from goc_deploy.engine_dir.manifest import Parameter
from goc_deploy.errors import VerificationError
from goc_deploy.exporters.lowering import Template
from goc_deploy.exporters.widening import widen_graph
from goc_deploy.metrics.paired import whole_relative_l2
from goc_deploy.precision import WeightFormat
from goc_deploy.protocols import Backend, Buffer, mapped_buffer

# A bf16 graph is widened to float32 before it is compared.
TOLERANCE = {
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 1e-4,
}
# Quantised weights may change an output this much. Normal weights lead to 0.004 and 0.07; sharp
# attention of a trained model (examples/mnist) on the random inputs leads to 0.025 and 0.33.
QUANTIZED_TOLERANCE: Mapping[WeightFormat, float] = {"w8": 0.1, "w8+dynamic": 0.1, "w4": 0.8}


def verify_copy(
    template: Template,
    name: str,
    parameters: Sequence[Parameter],
    tensors: Mapping[str, Tensor],
    folder: Path,
    backend: Backend,
) -> float:
    """Run an exported graph and PyTorch on the same inputs.

    Both use the weights rounded to the precision of the engine directory; PyTorch computes in
    float32. ONNX Runtime has no bf16 kernels on the CPU, so all tensors of a bf16 graph are widened
    to float32 for the comparison.

    Returns:
        The largest relative L2 error over the outputs.

    Raises:
        VerificationError: the error is above ``TOLERANCE``.
    """
    kind = template.kind
    with open(folder / f"{name}.weights", "rb") as file:
        weights = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    stored = _stored_parameters(template, name, tensors, weights, parameters)
    for parameter, value in kind.module.named_parameters():
        value.data = stored[parameter].float()
    kind.module.float()  # its buffers
    error = _difference(template, name, parameters, folder, weights, backend)
    if not error <= TOLERANCE[template.dtype]:
        raise VerificationError(
            f"unit {name}: the exported graph differs from PyTorch by {error:.2e} relative L2, "
            f"allowed are {TOLERANCE[template.dtype]:.0e}; the weights may overflow this "
            "precision, try `precision=fp32`"
        )
    return error


def verify_quantized(
    template: Template,
    name: str,
    parameters: Sequence[Parameter],
    folder: Path,
    backend: Backend,
    weight_format: WeightFormat,
) -> float:
    """Run a graph with quantised weights, and PyTorch with the weights before, on the same inputs.

    `verify_copy` ran before, so the module of the template has those weights.

    Returns:
        The largest relative L2 error over the outputs.

    Raises:
        VerificationError: the error is above ``QUANTIZED_TOLERANCE``.
    """
    with open(folder / f"{name}.weights", "rb") as file:
        weights = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    error = _difference(template, name, parameters, folder, weights, backend)
    if not error <= QUANTIZED_TOLERANCE[weight_format]:
        raise VerificationError(
            f"unit {name}: weights in {weight_format} change its outputs by {error:.2e} relative "
            f"L2, allowed are {QUANTIZED_TOLERANCE[weight_format]:.0e}; add "
            f"`quantize_exclude={name}`"
        )
    return error


def _difference(
    template: Template,
    name: str,
    parameters: Sequence[Parameter],
    folder: Path,
    weights: memoryview,
    backend: Backend,
) -> float:
    """The largest relative L2 error of a graph's outputs, compared with the module as it is."""
    kind = template.kind
    reference = getattr(kind.module, "reference", kind.module.forward)
    examples = [kind_input.example for kind_input in kind.inputs]
    wide = [e.float() if e.is_floating_point() else e for e in examples]
    with torch.inference_mode():
        expected = reference(*wide)
    wanted = (expected,) if isinstance(expected, Tensor) else expected
    shapes = [tuple(e.shape) for e in wanted]
    outputs = _run(template, name, parameters, folder, weights, shapes, backend)
    return max(whole_relative_l2(o, e.numpy()) for o, e in zip(outputs, wanted, strict=True))


def _stored_parameters(
    template: Template,
    name: str,
    tensors: Mapping[str, Tensor],
    weights: memoryview,
    parameters: Sequence[Parameter],
) -> dict[str, Tensor]:
    """The parameters in a weights file, not copied, but compared bitwise with the checkpoint."""
    stored = {}
    for p in parameters:
        with warnings.catch_warnings():
            # torch warns that the mapping is read-only, but nothing writes to it.
            warnings.simplefilter("ignore")
            whole = torch.frombuffer(
                weights, dtype=template.dtype, count=math.prod(p.shape), offset=p.offset
            )
        stored[p.name] = whole.reshape(p.shape)
        start = 0
        for slab in template.kind.copies[name][p.name]:
            rows = slab.read(tensors, template.dtype).reshape(-1)
            part = whole[start : start + rows.numel()]
            if not torch.equal(part.view(torch.uint8), rows.view(torch.uint8)):
                raise VerificationError(
                    f"unit {name}: {slab.key} differs between the weights file and the checkpoint; "
                    "check the disk"
                )
            start += rows.numel()
    return stored


def _run(
    template: Template,
    name: str,
    parameters: Sequence[Parameter],
    folder: Path,
    weights: memoryview,
    shapes: list[tuple[int, ...]],
    backend: Backend,
) -> list[np.ndarray]:
    graph = memoryview((folder / f"{name}.onnx").read_bytes())
    if template.dtype == torch.bfloat16:
        inputs = _parameters(template.kind.module) if template.kind.weights_are_inputs else {}
        integers = {
            p.name: mapped_buffer(weights, p.offset, p.shape, p.dtype)
            for p in parameters
            if p.dtype is not None
        }
        widened = onnx.load_from_string(bytes(graph))
        widen_graph(widened, weights, "bfloat16")
        content = memoryview(widened.SerializeToString())
        engine = backend.load(content, integers, inputs, runs_once=True)
    else:
        dtype = str(template.dtype).removeprefix("torch.")
        buffers = {
            p.name: mapped_buffer(weights, p.offset, p.shape, p.dtype or dtype) for p in parameters
        }
        weights_and_inputs = ({}, buffers) if template.kind.weights_are_inputs else (buffers, {})
        engine = backend.load(graph, *weights_and_inputs, runs_once=True)
    inputs, outputs = {}, {}
    for i in template.kind.inputs:
        inputs[i.name] = backend.allocate(tuple(i.example.shape), engine.dtypes[i.name])
        backend.upload(
            i.example.float().numpy() if i.example.is_floating_point() else i.example.numpy(),
            inputs[i.name],
        )
    for output, shape in zip(template.kind.outputs, shapes, strict=True):
        outputs[output] = backend.allocate(shape, engine.dtypes[output])
    engine.bind(inputs, outputs)()
    return [backend.download(outputs[output]) for output in template.kind.outputs]


def _parameters(module: nn.Module) -> dict[str, Buffer]:
    """The float32 parameters of a module, which may be gigabytes, without a copy."""
    values = {name: value.detach().numpy() for name, value in module.named_parameters()}
    return {
        name: mapped_buffer(value.reshape(-1).data, 0, value.shape, "float32")
        for name, value in values.items()
    }
