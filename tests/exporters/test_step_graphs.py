from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from goc_deploy.exporters.step_graphs import modulation_graph, sampler_graph
from goc_deploy.spec import ModelSpec


def run(model: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> np.ndarray:
    return ReferenceEvaluator(model).run(None, inputs)[0]


@pytest.mark.parametrize("learn_sigma", [False, True])
def test_guidance_acts_on_weighted_channels_and_the_table_row_is_applied(learn_sigma: bool) -> None:
    spec, rng = ModelSpec(1, 8, 2, 16, 2, 2, 4, 10, learn_sigma), np.random.default_rng(0)
    x, z = rng.standard_normal((2, 2, 4, 4, 4)).astype(np.float32)
    prediction = rng.standard_normal((4, spec.output_channels, 4, 4)).astype(np.float32)
    guidance = np.array([3, 3, 3, 1], np.float32)
    inputs = {
        "latents": x,
        "prediction": prediction,
        "noise": z,
        "guidance": guidance,
        "coefficients": np.array([0.9, -0.3, 0.1], np.float32),
    }
    rows = {"cond_rows": np.array([0, 1]), "uncond_rows": np.array([2, 3])}
    found = run(sampler_graph(spec), {**inputs, **rows})
    cond, uncond = prediction[:2, :4], prediction[2:, :4]
    guided = uncond + guidance[None, :, None, None] * (cond - uncond)
    np.testing.assert_allclose(found, 0.9 * x - 0.3 * guided + 0.1 * z, rtol=1e-5, atol=1e-6)


def test_modulation_rows_are_expanded_to_the_batch() -> None:
    spec, table = ModelSpec(1, 8, 2, 16, 2, 2, 4, 10, False), np.arange(3 * 2 * 8, dtype=np.float32).reshape(3, 2, 8)
    found = run(modulation_graph(spec, "fp32"), {"table": table, "rows": np.array([1, 1, 0])})
    np.testing.assert_array_equal(found, table[:, [1, 1, 0]])
