"""Sampler graphs with a head: what they add is what `goc_deploy.samplers.head_features` gives."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from goc_deploy.engine_dir.graph_check import check_graph
from goc_deploy.exporters.graphs.step import sampler_graph
from goc_deploy.precision import Precision
from goc_deploy.samplers.head import HeadForm
from goc_deploy.samplers.head_features import head_correction, head_features, normalized
from goc_deploy.spec import ModelSpec

SPEC = ModelSpec(1, 8, 2, 16, 2, 3, 4, 10, learn_sigma=True)
FORMS = [
    HeadForm(features, outputs, tokens, scaled)
    for features, outputs, tokens in (
        ("scalar", 0, 0),
        ("scalar", 3, 0),
        ("patch", 0, 0),
        ("patch", 3, 0),
        ("hidden", 2, 0),
        ("hidden", 3, 2),
        ("squares", 0, 0),
        ("squares", 3, 2),
    )
    for scaled in (False, True)
]


def run(model: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> dict[str, Any]:
    names = [output.name for output in model.graph.output]
    return dict(zip(names, ReferenceEvaluator(model).run(names, inputs), strict=True))


def inputs_of(form: HeadForm, spec: ModelSpec, lags: int = 0) -> dict[str, np.ndarray]:
    """Random inputs of three images: two with guidance, and one of scale 1."""
    random = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float32)

    side = spec.side
    inputs = {
        "latents": normal(3, spec.channels, side, side),
        "noise": normal(3, spec.channels, side, side),
        "prediction": normal(6, spec.output_channels, side, side),
        "guidance": np.float32([[4, 4, 4, 1], [1.5, 1.5, 1.5, 1], [1, 1, 1, 1]]),
        "cond_rows": np.arange(3),
        "uncond_rows": np.array([3, 4, 2]),
        "coefficients": normal(5 + lags if lags else 3),
        "head": normal(form.width(spec), form.cell_values(spec)),
    }
    inputs |= {
        f"estimate_{lag}": normal(3, spec.channels, side, side) for lag in range(1, 1 + lags)
    }
    inputs |= {
        f"output_{age}": normal(6, spec.output_channels, side, side)
        for age in range(1, 1 + form.outputs)
    }
    if form.reads_tokens:
        inputs["x"] = 7 * normal(6, spec.tokens, spec.hidden) + 3
        inputs |= {
            f"tokens_{age}": normal(6, spec.tokens, spec.hidden)
            for age in range(1, 1 + form.tokens)
        }
    return inputs


def expected_correction(
    form: HeadForm, spec: ModelSpec, inputs: dict[str, np.ndarray]
) -> np.ndarray:
    def sides(tensor: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return tensor[inputs["cond_rows"]], tensor[inputs["uncond_rows"]]

    kept = [inputs["prediction"], *(inputs[f"output_{i + 1}"] for i in range(form.outputs))]
    outputs = [sides(output[:, : spec.channels]) for output in kept]
    tokens = []
    if form.reads_tokens:
        earlier = [inputs[f"tokens_{i + 1}"] for i in range(form.tokens)]
        tokens = [sides(t) for t in [normalized(inputs["x"]), *earlier]]
    scales = inputs["guidance"][:, 0]
    z = head_features(form, spec, inputs["latents"], outputs, tokens, scales)
    return head_correction(inputs["head"], z, form, spec)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.signature)
@pytest.mark.parametrize("lags", [0, 2])
def test_the_correction_of_the_features_is_added(form: HeadForm, lags: int) -> None:
    inputs = inputs_of(form, SPEC, lags)
    graph = sampler_graph(SPEC, lags=lags, head=form)
    check_graph(graph.SerializeToString(), {}, "graph")
    found = run(graph, inputs)
    read = {value.name for value in sampler_graph(SPEC, lags=lags).graph.input}
    plain = run(sampler_graph(SPEC, lags=lags), {n: v for n, v in inputs.items() if n in read})
    correction = expected_correction(form, SPEC, inputs)
    np.testing.assert_allclose(
        found["latents_out"] - plain["latents_out"], correction, rtol=1e-4, atol=1e-4
    )
    if lags:
        np.testing.assert_array_equal(found["estimate"], plain["estimate"])


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.signature)
@pytest.mark.parametrize("learned", [False, True])
def test_a_head_of_zeros_changes_no_bit(form: HeadForm, learned: bool) -> None:
    inputs = inputs_of(form, SPEC)
    inputs["head"] = np.zeros_like(inputs["head"])
    if learned:
        inputs["coefficients"] = np.float32([0.9, -0.3, 0.1, 0.7])
    plain = sampler_graph(SPEC, learned=learned)
    read = {value.name for value in plain.graph.input}
    np.testing.assert_array_equal(
        run(sampler_graph(SPEC, learned=learned, head=form), inputs)["latents_out"],
        run(plain, {n: v for n, v in inputs.items() if n in read})["latents_out"],
    )


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_tokens_are_normalised_and_kept_in_the_precision_of_the_engine(
    precision: Precision,
) -> None:
    form = HeadForm("hidden", 1, 1)
    graph = sampler_graph(SPEC, head=form, precision=precision)
    types = {
        v.name: v.type.tensor_type.elem_type for v in (*graph.graph.input, *graph.graph.output)
    }
    kind = {"fp32": 1, "fp16": 10, "bf16": 16}[precision]
    assert {types[name] for name in ("x", "tokens_1", "tokens")} == {kind}
    narrow = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}[precision]
    inputs = inputs_of(form, SPEC)
    for name in ("x", "tokens_1"):
        inputs[name] = inputs[name].astype(narrow)
    found = run(graph, inputs)["tokens"]
    assert found.dtype == narrow
    atol = {"fp32": 1e-6, "fp16": 2e-3, "bf16": 2e-2}[precision]
    np.testing.assert_allclose(found.astype(np.float32), normalized(inputs["x"]), rtol=0, atol=atol)


def test_only_forms_that_read_tokens_of_earlier_steps_keep_them() -> None:
    for form in FORMS:
        outputs = [value.name for value in sampler_graph(SPEC, head=form).graph.output]
        assert ("tokens" in outputs) == (form.tokens > 0)
