"""Guidance that keeps the norm of the conditional output, token by token."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from onnx.reference import ReferenceEvaluator

from goc_deploy.engine_dir.graph_check import check_graph
from goc_deploy.engines.ort import OrtBackend
from goc_deploy.exporters.graphs.step import sampler_graph, sampler_graphs
from goc_deploy.samplers.head import HeadForm
from goc_deploy.spec import ModelSpec

PLAIN = ModelSpec(1, 8, 2, 16, 2, (3, 5), 4, 0, False, max_grid=(5, 5))
SPEC = replace(PLAIN, guidance_norm="token")


def inputs_of(uncond_rows: list[int], scale: float) -> dict[str, np.ndarray]:
    """Two images, whose conditional outputs are rows 0 and 1."""
    rng = np.random.default_rng(0)
    x, z = rng.standard_normal((2, 2, *SPEC.latents)).astype(np.float32)
    return {
        "latents": x,
        "prediction": rng.standard_normal((4, *SPEC.prediction)).astype(np.float32),
        "cond_rows": np.array([0, 1]),
        "uncond_rows": np.array(uncond_rows),
        "guidance": np.full((2, 4), scale, np.float32),
        "coefficients": np.array([0.9, -0.3, 0.1], np.float32),
        "noise": z,
    }


def by_tokens(latents: np.ndarray) -> np.ndarray:
    """(N, C, H, W) to tokens (N, h, w, C*p*p)."""
    (rows, columns), patch = SPEC.axes, SPEC.patch
    split = latents.reshape(-1, SPEC.channels, rows, patch, columns, patch)
    return split.transpose(0, 2, 4, 1, 3, 5).reshape(len(latents), rows, columns, -1)


@pytest.mark.parametrize("backend", ["onnx", "ort"])
def test_every_token_has_the_norm_of_the_conditional_output(backend: str) -> None:
    inputs, graph = inputs_of([2, 3], 4.0), sampler_graph(SPEC)
    if backend == "onnx":
        (found,) = ReferenceEvaluator(graph).run(None, inputs)
    else:
        ort = OrtBackend()
        engine = ort.load(memoryview(graph.SerializeToString()), {}, {})
        given = {}
        for name, values in inputs.items():
            given[name] = ort.allocate(values.shape, engine.dtypes[name])
            ort.upload(values, given[name])
        out = ort.allocate((2, *SPEC.latents), "float32")
        engine.bind(given, {"latents_out": out})()
        found = ort.download(out)
    cond, uncond = inputs["prediction"][:2], inputs["prediction"][2:]
    kept, combined = by_tokens(cond), by_tokens(uncond + 4 * (cond - uncond))
    sizes = (np.linalg.norm(part, axis=-1, keepdims=True) for part in (kept, combined))
    ratio = np.divide(*sizes)
    rest = by_tokens(np.float32(0.9) * inputs["latents"] + np.float32(0.1) * inputs["noise"])
    np.testing.assert_allclose(by_tokens(found), rest - 0.3 * combined * ratio, atol=2e-6)


@pytest.mark.parametrize("zero", [False, True])
def test_an_image_without_guidance_is_not_changed(*, zero: bool) -> None:
    inputs = inputs_of([0, 1], 1.0)
    if zero:
        inputs["prediction"][:] = 0
    found, expected = (
        ReferenceEvaluator(sampler_graph(spec)).run(None, inputs)[0] for spec in (SPEC, PLAIN)
    )
    np.testing.assert_array_equal(found, expected)


def test_skip_layer_guidance_is_added_to_the_channels_of_its_images() -> None:
    skips = {
        "skipped_rows": np.array([4, 5]),
        "skip_guidance": np.array([[2, 2, 2, 0], [0, 0, 0, 0]], np.float32),
    }
    inputs = inputs_of([2, 3], 4.0)
    more = np.random.default_rng(1).standard_normal((2, *SPEC.prediction)).astype(np.float32)
    inputs["prediction"] = np.concatenate([inputs["prediction"], more])
    graph = sampler_graph(replace(PLAIN, skip_guidance_layers=(0,)))
    (found,) = ReferenceEvaluator(graph).run(None, {**inputs, **skips})
    cond, uncond, skipped = np.split(inputs["prediction"], 3)
    guided = uncond + 4 * (cond - uncond)
    guided += skips["skip_guidance"][:, :, None, None] * (cond - skipped)
    rest = np.float32(0.9) * inputs["latents"] + np.float32(0.1) * inputs["noise"]
    np.testing.assert_allclose(found, rest - 0.3 * guided, atol=2e-6)
    usual = {**inputs, "prediction": inputs["prediction"][:4]}
    (without,) = ReferenceEvaluator(sampler_graph(PLAIN)).run(None, usual)
    np.testing.assert_array_equal(found[1], without[1])


def test_graphs_are_those_that_directories_may_hold() -> None:
    graphs = sampler_graphs(SPEC)
    for form in (HeadForm("scalar", 3), HeadForm("patch", 2), HeadForm("hidden", 1, 1)):
        graphs[form.signature] = sampler_graph(replace(SPEC, max_grid=None), lags=2, head=form)
    for name, graph in graphs.items():
        check_graph(graph.SerializeToString(), {}, name)
