"""Which operators the exported graphs have.

They are those that ONNX Runtime's CUDA provider runs in every precision.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx.inliner
import pytest
import torch

import goc_deploy
from benchmarks.make_checkpoint import random_state
from goc_deploy.exporters.architectures import dit, sit
from goc_deploy.spec import ModelSpec
from tests import pixart_reference

DIT = ModelSpec(2, 48, 3, 192, 2, 4, 4, 10, True)
# Those of our operators that have a bfloat16 kernel at opset 20, by docs/OperatorKernels.md of ONNX
# Runtime (CUDAExecutionProvider). Conv has one from opset 22 on only.
BFLOAT16_ON_CUDA = frozenset(
    [
        "Add",
        "Cast",
        "CastLike",
        "Concat",
        "Expand",
        "Gather",
        "Gelu",
        "Gemm",
        "Identity",
        "MatMul",
        "Mul",
        "Reshape",
        "Shape",
        "Sigmoid",
        "Slice",
        "Split",
        "Squeeze",
        "Tanh",
        "Transpose",
        "Unsqueeze",
        "Where",
    ]
)


@pytest.fixture(scope="module", params=["fp32", "fp16", "bf16"])
def precision(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=["dit", "pixart"])
def engine(
    request: pytest.FixtureRequest, precision: str, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An export with launches by unit, predictions and segments."""
    folder = tmp_path_factory.mktemp("operators")
    state, spec = (
        (random_state(DIT, 1), DIT)
        if request.param == "dit"
        else (pixart_reference.random_state(), pixart_reference.SPEC)
    )
    torch.save(state, folder / "model.pt")
    goc_deploy.export(
        folder / "model.pt",
        folder / "engine",
        num_heads=spec.heads,
        precision=precision,
        plans=["none", "fora:2+gc:1.0"],
        steps=4,
    )
    return folder / "engine"


def test_no_graph_of_the_model_has_a_convolution(engine: Path) -> None:
    graphs = sorted(engine.rglob("*.onnx"))
    assert any(path.stem == "embed" for path in graphs)
    for path in graphs:
        ops = {node.op_type for node in onnx.load(path, load_external_data=False).graph.node}
        assert "Conv" not in ops, path.name
    assert sit.SIT.graph_kinds is dit.DIT.graph_kinds


def test_the_patch_embedding_reads_the_kernel_as_it_is_stored(engine: Path) -> None:
    model = onnx.load(engine / "onnx" / "embed.onnx", load_external_data=False)
    (gemm,) = (node for node in model.graph.node if node.op_type == "Gemm")
    assert gemm.input[1] in {
        initializer.name for initializer in model.graph.initializer
    }  # no operator between


def check_bfloat16(directory: Path) -> set[str]:
    """Check that operators on bfloat16 have a kernel for it on CUDA; returns which there are."""
    found = set()
    for path in directory.rglob("*.onnx"):
        model = onnx.inliner.inline_local_functions(onnx.load(path, load_external_data=False))
        graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
        values = [*graph.input, *graph.output, *graph.value_info]
        types = {value.name: value.type.tensor_type.elem_type for value in values}
        types |= {initializer.name: initializer.data_type for initializer in graph.initializer}
        for node in graph.node:
            of_node = {types[name] for name in [*node.input, *node.output] if name}
            if onnx.TensorProto.BFLOAT16 in of_node:
                assert node.op_type in BFLOAT16_ON_CUDA, (path.name, node.name)
                found.add(node.op_type)
    return found


def test_bfloat16_meets_only_operators_that_have_a_kernel_for_it(
    engine: Path, precision: str
) -> None:
    assert bool(check_bfloat16(engine)) == (precision == "bf16")
