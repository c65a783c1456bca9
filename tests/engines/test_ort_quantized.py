"""Which operators ONNX Runtime makes of products with quantised weights."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch

from goc_deploy.engines.ort import OrtBackend
from goc_deploy.engines.ort_quantized import optimizers_in_the_way, session_entries
from goc_deploy.exporters.architectures.dit import graph_kinds, spec_from_tensors
from goc_deploy.exporters.unit_files import UnitWriter
from goc_deploy.options import no_progress
from goc_deploy.precision import DTYPE_OF_FORMAT, WeightFormat
from tests.conftest import GOLDEN

STATE = torch.load(GOLDEN / "model.pt", weights_only=True)
MLP = 3
NAME = "block_01_mlp"


def optimised(
    folder: Path, weight_format: WeightFormat, provider: str = "CPU"
) -> list[onnx.NodeProto]:
    """The nodes that run on the CPU with the settings of a provider."""
    kind = graph_kinds(spec_from_tensors(STATE, 4), "fp32")[MLP]
    UnitWriter(folder, OrtBackend(), no_progress, {NAME: [weight_format]}).write(
        [kind], STATE, "fp32"
    )
    graph, dtypes = folder / "onnx" / f"{NAME}.onnx", {DTYPE_OF_FORMAT[weight_format], "float32"}
    options = onnxruntime.SessionOptions()
    options.use_per_session_threads = False  # as the pool of OrtBackend wants it
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    for key, value in session_entries(graph.read_bytes(), dtypes).items():
        options.add_session_config_entry(key, value)
    onnxruntime.InferenceSession(
        graph,
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=optimizers_in_the_way(graph.read_bytes(), dtypes, provider),
    )
    return list(onnx.load(folder / "optimised.onnx", load_external_data=False).graph.node)


@pytest.mark.parametrize(
    ("weight_format", "provider", "fused", "rounding"),
    [
        ("w8", "CPU", False, None),
        ("w8", "CUDA", True, 1),
        ("w8+dynamic", "CPU", True, 4),
        ("w4", "CPU", True, 1),
    ],
)
def test_what_becomes_one_operator(
    weight_format: WeightFormat, provider: str, fused: bool, rounding: int | None, tmp_path: Path
) -> None:
    nodes = optimised(tmp_path, weight_format, provider)
    products = [node for node in nodes if node.op_type == "MatMulNBits"]
    assert len(products) == (2 if fused else 0)
    assert sum(node.op_type == "DequantizeLinear" for node in nodes) == (0 if fused else 2)
    levels = {
        attribute.i
        for node in products
        for attribute in node.attribute
        if attribute.name == "accuracy_level"
    }
    assert levels == ({rounding} if fused else set())
