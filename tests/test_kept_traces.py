"""Traced graphs that exports of the tests share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from torch import nn

from goc_deploy.exporters.lowering import template_from_kind
from goc_deploy.exporters.units import GraphKind, Input
from tests.kept_traces import digest, kept_template
from tests.warm_commands import TRACES


class Scaled(nn.Module):
    def __init__(self, width: int, factor: float) -> None:
        super().__init__()
        self.linear, self.factor = nn.Linear(width, width), factor
        self.register_buffer("shift", torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * self.factor + self.shift


class Turned(Scaled):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * self.factor - self.shift


def kind(module: nn.Module, width: int = 4) -> GraphKind:
    x = Input("x", torch.randn(2, width), {0: "batch"})
    return GraphKind("scaled", module, (x,), ("y",), {})


def other_buffer() -> GraphKind:
    found = kind(Scaled(4, 2.0))
    found.module.shift[1] = 3.0
    return found


def test_a_graph_is_found_again_whatever_its_parameters_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TRACES, str(tmp_path))
    first = kept_template(kind(Scaled(4, 2.0)), torch.float32)
    second = kept_template(kind(Scaled(4, 2.0)), torch.float32)
    assert len([*tmp_path.iterdir()]) == 1
    traced = template_from_kind(kind(Scaled(4, 2.0)), torch.float32).model
    for template in (first, second):
        assert [node.op_type for node in template.model.graph] == [n.op_type for n in traced.graph]
        for found, expected in zip(template.model.graph.inputs, traced.graph.inputs, strict=True):
            assert (found.name, found.shape) == (expected.name, expected.shape)
        assert ir.to_proto(template.model).opset_import == ir.to_proto(traced).opset_import


@pytest.mark.parametrize(
    "other",
    [
        kind(Scaled(4, 3.0)),
        kind(Scaled(5, 2.0), 5),
        kind(Turned(4, 2.0)),
        other_buffer(),
        replace(kind(Scaled(4, 2.0)), outputs=("z",)),
        replace(kind(Scaled(4, 2.0)), weights_are_inputs=True),
        replace(kind(Scaled(4, 2.0)), inputs=(Input("x", torch.zeros(2, 4), {}),)),
    ],
)
def test_another_graph_has_another_name(other: GraphKind) -> None:
    assert digest(other, torch.float32) != digest(kind(Scaled(4, 2.0)), torch.float32)


def test_another_dtype_has_another_name() -> None:
    names = {digest(kind(Scaled(4, 2.0)), dtype) for dtype in (torch.float32, torch.float16)}
    assert len(names) == 2


def test_code_that_a_test_replaces_is_another_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest(kind(Scaled(4, 2.0)), torch.float32)
    monkeypatch.setattr(Scaled, "forward", Turned.forward)
    assert digest(kind(Scaled(4, 2.0)), torch.float32) != before
