"""Sampler graphs with heads, really built by TensorRT-RTX."""

from __future__ import annotations

import pytest

from goc_deploy.engine_dir.keys import dimension_profiles
from goc_deploy.engines.tensorrt import graphs
from goc_deploy.engines.tensorrt.build import BuildRequest
from goc_deploy.engines.tensorrt.process import build_process
from goc_deploy.exporters.graphs.step import sampler_graph
from goc_deploy.precision import Precision
from goc_deploy.samplers.head import HeadForm
from goc_deploy.spec import ModelSpec
from tests.heads import FORMS

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed (extra rtx)")
pytest.importorskip("polygraphy", reason="polygraphy is not installed (extra rtx)")

SPEC = ModelSpec(2, 64, 4, 256, 2, 4, 4, 10, True)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_graphs_of_every_form_build(precision: Precision) -> None:
    (ranges,) = dimension_profiles("tensorrt-rtx", SPEC, max_batch=4, steps=20)
    ways: list[tuple[HeadForm, int]] = [(form, 0) for form in FORMS.values()]
    ways.append((FORMS["hidden3-2"], 3))
    with build_process("tensorrt-rtx", plugin=False) as process:
        for form, lags in ways:
            model = sampler_graph(SPEC, lags=lags, head=form, precision=precision)
            shapes, _ = graphs.input_shapes(model, ranges, "graph")
            assert "head" not in shapes  # its shape is fixed
            request = BuildRequest([shapes], ["8.6", "8.9", "12.0"], 0)
            built = process.build(model.SerializeToString(), request)
            assert built.report.refusal == "", form.signature
            assert built.report.kernels
