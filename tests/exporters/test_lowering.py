from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from goc_deploy.engines.ort import OrtBackend
from goc_deploy.errors import VerificationError
from goc_deploy.exporters.architectures.dit import graph_kinds, spec_from_tensors
from goc_deploy.exporters.lowering import OPSET, Template, template_from_kind, write_copy
from goc_deploy.exporters.tracing import empty_module, same_names
from goc_deploy.exporters.units import DTYPES, GraphKind, Input
from goc_deploy.exporters.verification import TOLERANCE, verify_copy
from tests.conftest import GOLDEN

STATE = torch.load(GOLDEN / "model.pt", weights_only=True)
SPEC = spec_from_tensors(STATE, 4)


@pytest.fixture(scope="module", params=["fp32", "fp16", "bf16"])
def templates(request: pytest.FixtureRequest) -> dict[str, Template]:
    dtype = DTYPES[request.param]
    return {kind.kind: template_from_kind(kind, dtype) for kind in graph_kinds(SPEC, request.param)}


def test_every_unit_equals_pytorch_and_passes_the_checker(
    templates: dict[str, Template], tmp_path: Path
) -> None:
    for template in templates.values():
        for name in template.kind.copies:
            parameters = write_copy(template, name, STATE, tmp_path)
            error = verify_copy(template, name, parameters, STATE, tmp_path, OrtBackend())
            assert error < TOLERANCE[template.dtype] / 10, name


def test_graphs_are_strongly_typed_with_float32_softmax_and_norm(
    templates: dict[str, Template], tmp_path: Path
) -> None:
    write_copy(templates["attn"], "block_00_attn", STATE, tmp_path)
    model = onnx.shape_inference.infer_shapes(
        onnx.load(tmp_path / "block_00_attn.onnx", load_external_data=False), strict_mode=True
    )
    assert model.opset_import[0].version == OPSET >= 18
    types = {
        v.name: v.type.tensor_type.elem_type
        for v in [*model.graph.value_info, *model.graph.input, *model.graph.output]
    }
    for node in model.graph.node:
        if node.op_type in ("Softmax", "LayerNormalization"):
            assert types[node.output[0]] == onnx.TensorProto.FLOAT
    weight_type = {torch.float32: 1, torch.float16: 10, torch.bfloat16: 16}[templates["attn"].dtype]
    assert {types[name] for name in ("x", "gate", "x_out", "feature")} == {weight_type}


def test_weights_are_stored_as_the_checkpoint_has_them(tmp_path: Path) -> None:
    template = template_from_kind(graph_kinds(SPEC, "fp32")[2], torch.float32)
    write_copy(template, "block_02_attn", STATE, tmp_path)
    model = onnx.load(tmp_path / "block_02_attn.onnx")
    stored = {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer}
    np.testing.assert_array_equal(
        stored["attn.qkv.weight"], STATE["blocks.2.attn.qkv.weight"].numpy()
    )


def test_a_unit_with_the_weights_of_another_block_is_refused(tmp_path: Path) -> None:
    template = template_from_kind(graph_kinds(SPEC, "fp32")[3], torch.float32)
    parameters = write_copy(template, "block_00_mlp", STATE, tmp_path)
    write_copy(template, "block_01_mlp", STATE, tmp_path)
    (tmp_path / "block_00_mlp.weights").write_bytes(
        (tmp_path / "block_01_mlp.weights").read_bytes()
    )
    with pytest.raises(
        VerificationError,
        match=r"unit block_00_mlp: blocks.0.mlp.fc1.weight differs between the weights file and "
        r"the checkpoint",
    ):
        verify_copy(template, "block_00_mlp", parameters, STATE, tmp_path, OrtBackend())


def test_a_graph_that_computes_something_else_fails_the_comparison(tmp_path: Path) -> None:
    template = template_from_kind(graph_kinds(SPEC, "fp32")[3], torch.float32)
    parameters = write_copy(template, "block_00_mlp", STATE, tmp_path)
    model = onnx.load(tmp_path / "block_00_mlp.onnx", load_external_data=False)
    (gelu,) = (node for node in model.graph.node if node.op_type == "Gelu")
    gelu.attribute[0].s = b"none"
    onnx.save(model, tmp_path / "block_00_mlp.onnx")
    with pytest.raises(
        VerificationError, match="unit block_00_mlp: the exported graph differs from PyTorch"
    ):
        verify_copy(template, "block_00_mlp", parameters, STATE, tmp_path, OrtBackend())


def test_small_weights_are_kept_whatever_memory_they_were_given() -> None:
    torch.use_deterministic_algorithms(True)  # uninitialized memory is filled with one value
    try:
        module = empty_module(
            lambda: TwoProjections(16), torch.float32, torch.Generator().manual_seed(0)
        )
    finally:
        torch.use_deterministic_algorithms(False)
    kind = GraphKind(
        "two",
        module,
        (Input("x", torch.ones(2, 16), {0: "rows"}),),
        ("y",),
        {"two": same_names(module)},
    )
    template = template_from_kind(kind, torch.float32)
    assert {"first.weight", "second.weight"} <= template.model.graph.initializers.keys()


class TwoProjections(torch.nn.Module):
    """Two equal weights, if they are equal, are one initializer to the ONNX optimiser."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = torch.nn.Linear(width, width, bias=False)
        self.second = torch.nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) + self.second(x).sin()


def test_a_module_may_compute_a_value_with_the_name_of_an_input(tmp_path: Path) -> None:
    module = empty_module(Cosine, torch.float32, torch.Generator().manual_seed(0))
    inputs = tuple(Input(name, torch.ones(2, 16), {0: "rows"}) for name in ("cos", "x"))
    kind = GraphKind("one", module, inputs, ("y",), {"one": same_names(module)})
    template = template_from_kind(kind, torch.float32)
    tensors = {"weight": torch.ones(16)}
    parameters = write_copy(template, "one", tensors, tmp_path)
    assert verify_copy(template, "one", parameters, tensors, tmp_path, OrtBackend()) < 1e-6


class Cosine(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(16))

    def forward(self, *given: torch.Tensor) -> torch.Tensor:
        cos, x = given
        return cos * x.cos() * self.weight
