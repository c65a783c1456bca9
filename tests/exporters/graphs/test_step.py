from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from goc_deploy.exporters.graphs.step import (
    modulation_graph,
    residual_graph,
    sampler_graph,
    sampler_graphs,
)
from goc_deploy.spec import ModelSpec

LAGS = ("sampler_lag1", "sampler_lag2", "sampler_lag3")


def run(model: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> np.ndarray:
    return ReferenceEvaluator(model).run(None, inputs)[0]


@pytest.mark.parametrize("learn_sigma", [False, True])
def test_guidance_weighs_each_channel_of_each_image_and_the_table_row_is_applied(
    learn_sigma: bool,
) -> None:
    spec, rng = ModelSpec(1, 8, 2, 16, 2, 2, 4, 10, learn_sigma), np.random.default_rng(0)
    x, z = rng.standard_normal((2, 2, 4, 4, 4)).astype(np.float32)
    prediction = rng.standard_normal((4, spec.output_channels, 4, 4)).astype(np.float32)
    guidance = np.array([[3, 3, 3, 1], [2, 2, 2, 1]], np.float32)
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
    guided = uncond + guidance[..., None, None] * (cond - uncond)
    np.testing.assert_allclose(found, 0.9 * x - 0.3 * guided + 0.1 * z, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lags", [1, 2, 3])
def test_earlier_estimates_join_the_update_and_a_new_one_is_kept(lags: int) -> None:
    spec, rng = ModelSpec(1, 8, 2, 16, 2, 2, 4, 10, False), np.random.default_rng(1)
    x, m, z, *kept = rng.standard_normal((3 + lags, 2, 4, 4, 4)).astype(np.float32)
    coefficients = rng.standard_normal(5 + lags).astype(np.float32)
    inputs = {"latents": x, "prediction": m, "noise": z, "guidance": np.ones((2, 4), np.float32)}
    inputs |= {
        "cond_rows": np.array([0, 1]),
        "uncond_rows": np.array([0, 1]),
        "coefficients": coefficients,
    }
    inputs |= {f"estimate_{lag}": estimate for lag, estimate in enumerate(kept, 1)}
    found, estimate = ReferenceEvaluator(sampler_graph(spec, lags=lags)).run(None, inputs)
    c, w = coefficients[:5], coefficients[5:]
    expected = (
        c[0] * x + c[1] * m + c[2] * z + sum(weight * k for weight, k in zip(w, kept, strict=True))
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(estimate, c[3] * x + c[4] * m, rtol=1e-5, atol=1e-5)


def test_the_conditional_rows_variance_scales_the_noise() -> None:
    spec, rng = ModelSpec(1, 8, 2, 16, 2, 2, 4, 10, True), np.random.default_rng(2)
    x, z = rng.standard_normal((2, 2, 4, 4, 4)).astype(np.float32)
    prediction = rng.standard_normal((4, 8, 4, 4)).astype(np.float32)
    inputs = {
        "latents": x,
        "prediction": prediction,
        "noise": z,
        "guidance": np.full((2, 4), 2, np.float32),
    }
    inputs |= {"cond_rows": np.array([0, 1]), "uncond_rows": np.array([2, 3])}
    inputs["coefficients"] = np.array([0.9, -0.3, 0.1, 0.7], np.float32)
    found = run(sampler_graph(spec, learned=True), inputs)
    guided = 2 * prediction[:2, :4] - prediction[2:, :4]
    expected = 0.9 * x - 0.3 * guided + 0.1 * np.exp(0.7 * prediction[:2, 4:]) * z
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_only_models_that_learn_sigma_get_the_graph_that_reads_it() -> None:
    spec = ModelSpec(1, 8, 2, 16, 2, 2, 4, 10, True)
    assert sampler_graphs(spec).keys() == {"sampler", *LAGS, "sampler_learned"}
    assert sampler_graphs(replace(spec, learn_sigma=False)).keys() == {"sampler", *LAGS}


def test_modulation_rows_are_expanded_to_the_batch() -> None:
    spec, table = (
        ModelSpec(1, 8, 2, 16, 2, 2, 4, 10, False),
        np.arange(3 * 2 * 8, dtype=np.float32).reshape(3, 2, 8),
    )
    found = run(modulation_graph(spec, "fp32"), {"table": table, "rows": np.array([1, 1, 0])})
    np.testing.assert_array_equal(found, table[:, [1, 1, 0]])


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", np.float32), ("fp16", np.float16)])
def test_the_residual_is_what_all_units_added(precision: str, dtype: type) -> None:
    spec = ModelSpec(1, 8, 2, 16, 2, 2, 4, 10, False)
    x, start = np.random.default_rng(2).standard_normal((2, 3, spec.tokens, 8)).astype(dtype)
    found = run(residual_graph(spec, precision), {"x": x, "start": start})
    np.testing.assert_array_equal(found, x - start)
