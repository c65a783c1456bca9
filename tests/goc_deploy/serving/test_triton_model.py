"""The model of Triton's Python backend, without a server."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import goc_deploy
from goc_deploy.errors import EngineDirError, EnvironmentUnsupportedError, UsageError
from goc_deploy.runtime.pipeline import Pipeline
from goc_deploy.runtime.request import Drawing
from goc_deploy.serving.triton_model import TritonPythonModel
from tests.stand_ins import triton
from tests.stand_ins.triton import InferenceRequest

PARAMETERS = {"plans": '["none", "fora:2"]', "backend": "onnxruntime", "threads": "1"}


def arguments(engine: Path, batch: int = 4, **more: str) -> dict[str, str]:
    parameters = {"engine_dir": str(engine), **PARAMETERS, **more}
    config = {
        "max_batch_size": batch,
        "parameters": {key: {"string_value": value} for key, value in parameters.items()},
    }
    return {
        "model_config": json.dumps(config),
        "model_name": "golden",
        "model_instance_name": "golden_0_0",
        "model_instance_kind": "CPU",
        "model_instance_device_id": "0",
        "model_repository": "/models/golden",
        "model_version": "1",
    }


@pytest.fixture(scope="module", autouse=True)
def utils() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        made = triton.module()
        patch.setitem(sys.modules, "triton_python_backend_utils", made)
        yield made


@pytest.fixture(scope="module")
def model(golden_engine: Path) -> Iterator[TritonPythonModel]:
    made = TritonPythonModel()
    made.initialize(arguments(golden_engine))
    assert made.is_ready()
    yield made
    made.finalize()
    assert not made.is_ready()


@pytest.fixture(scope="module")
def alone(golden_engine: Path) -> Iterator[Pipeline]:
    with goc_deploy.load(golden_engine, plan="fora:2", backend="onnxruntime") as pipe:
        yield pipe


def error(response: Any) -> tuple[str, str]:
    assert response.outputs == {}
    return response.error.code, response.error.message


def test_each_row_is_the_image_of_its_own_seed_whatever_runs_beside_it(
    model: TritonPythonModel, alone: Pipeline
) -> None:
    two = InferenceRequest(LABEL=[b"3", b"7"], SEED=[5, 2**64 - 1], GUIDANCE_SCALE=[2.0, 3.5])
    one = InferenceRequest(LABEL=["4"], SEED=[6], outputs=("LATENTS",))
    first, second = model.execute([two, one])
    expected = alone.generate([3, 7], seed=[5, 2**64 - 1], cfg_scale=[2.0, 3.5])
    np.testing.assert_array_equal(first.outputs["LATENTS"], expected.latents)
    np.testing.assert_array_equal(first.outputs["USED_SEED"], [[5], [2**64 - 1]])
    assert list(second.outputs) == ["LATENTS"]
    np.testing.assert_array_equal(second.outputs["LATENTS"], alone.generate([4], seed=6).latents)


def test_a_request_without_seeds_gets_others_each_time_and_is_told_which(
    model: TritonPythonModel, alone: Pipeline
) -> None:
    first, second = model.execute([InferenceRequest(LABEL=[b"1", b"1"]) for _ in range(2)])
    seeds = [*first.outputs["USED_SEED"][:, 0], *second.outputs["USED_SEED"][:, 0]]
    assert len(set(seeds)) == 4
    expected = alone.generate([1, 1], seed=[int(seed) for seed in seeds[:2]])
    np.testing.assert_array_equal(first.outputs["LATENTS"], expected.latents)


def test_a_request_chooses_its_plan(model: TritonPythonModel, alone: Pipeline) -> None:
    names = ("none", "fora-2", "fora:2", None)
    responses = model.execute(
        [InferenceRequest(LABEL=[b"1"], SEED=[1], plan=name) for name in names]
    )
    none, *cached = (response.outputs["LATENTS"] for response in responses)
    expected = alone.generate([1], seed=1).latents
    for latents in cached:
        np.testing.assert_array_equal(latents, expected)
    assert not np.array_equal(none, expected)


WRONG = {
    "no such class": ({"LABEL": [b"10"]}, "label 10"),
    "negative class": ({"LABEL": [b"-1"]}, "label -1"),
    "two classes in a row": ({"LABEL": [b"1,2"]}, "one class, by name or number, got '1,2'"),
    "no number": ({"LABEL": [b"1.0"]}, "must be a whole number"),
    "empty": ({"LABEL": [b""]}, "must be a whole number"),
    "not UTF-8": ({"LABEL": [b"1", b"\xff"]}, "row 1 of LABEL is not UTF-8"),
    "no input": ({"SEED": [1]}, "the request has no input LABEL"),
    "no rows": ({"LABEL": []}, "labels are empty"),
    "too many rows": ({"LABEL": [b"1"] * 5}, "has 1..4 images, got 5"),
    "guidance": ({"LABEL": [b"1"], "GUIDANCE_SCALE": [np.nan]}, "GUIDANCE_SCALE must be"),
    "fewer seeds": ({"LABEL": [b"1", b"2"], "SEED": [1]}, "1 rows of SEED for 2 images"),
    "no such plan": ({"LABEL": [b"1"], "plan": "fora:3"}, "there is no plan 'fora:3'"),
    "plan is a number": ({"LABEL": [b"1"], "plan": 3}, "the parameter plan is the name"),
}


def test_a_wrong_request_is_an_error_of_its_own(model: TritonPythonModel, alone: Pipeline) -> None:
    good = InferenceRequest(LABEL=[b"2"], SEED=[9])
    wrong = [InferenceRequest(**more) for more, _ in WRONG.values()]
    first, *refused, last = model.execute([good, *wrong, good])
    expected = alone.generate([2], seed=9)
    for response in (first, last):
        assert response.error is None
        np.testing.assert_array_equal(response.outputs["LATENTS"], expected.latents)
    for response, (_, message) in zip(refused, WRONG.values(), strict=True):
        code, text = error(response)
        assert code == "INVALID_ARG"
        assert message in text


def test_a_cancelled_request_ends_and_the_others_do_not_change(
    model: TritonPythonModel, alone: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, go = threading.Event(), threading.Event()
    draw = Pipeline.draw

    def held(*rest: Any) -> Any:
        running.set()
        assert go.wait(60)
        return draw(*rest)

    def gone() -> bool:
        if running.is_set():
            threading.Timer(0.2, go.set).start()
        return running.is_set()

    monkeypatch.setattr(Pipeline, "draw", held)
    late = InferenceRequest(LABEL=[b"1"], cancelled=gone)
    early = InferenceRequest(LABEL=[b"1"], cancelled=lambda: True)
    kept = InferenceRequest(LABEL=[b"2"], SEED=[9])
    first, second, third = model.execute([late, early, kept])
    assert error(first) == ("CANCELLED", "the request was cancelled through its token")
    assert error(second) == ("CANCELLED", "the request was cancelled before it ran")
    np.testing.assert_array_equal(third.outputs["LATENTS"], alone.generate([2], seed=9).latents)


def test_a_request_whose_timeout_is_over_is_unavailable(
    model: TritonPythonModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pipeline, "draw", lambda *_: time.sleep(0.3))
    (response,) = model.execute([InferenceRequest(LABEL=[b"1"], timeout=50_000)])
    code, text = error(response)
    assert code == "UNAVAILABLE"
    assert "deadline of 0.05 s" in text


def test_an_image_that_is_not_finite_fails_its_request_only(
    model: TritonPythonModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = Drawing.request

    def with_bad_noise(drawing: Drawing, part: range, *rest: object) -> object:
        made = request(drawing, part, *rest)
        for row, key in zip(made.noise, drawing.noise_keys[part.start : part.stop], strict=True):
            if key[0] == 66:
                row[:] = 3e38
        return made

    monkeypatch.setattr(Drawing, "request", with_bad_noise)
    with np.errstate(all="ignore"):
        bad, good = model.execute(
            [InferenceRequest(LABEL=[b"1"], SEED=[seed]) for seed in (66, 67)]
        )
    code, text = error(bad)
    assert code == "INTERNAL"
    assert "not finite" in text
    assert good.error is None


def test_a_bug_is_an_internal_error_with_a_traceback_in_the_log(
    model: TritonPythonModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(Pipeline, "draw", broken)
    (response,) = model.execute([InferenceRequest(LABEL=[b"1"])])
    assert error(response) == ("INTERNAL", "RuntimeError: boom")
    assert "boom" in caplog.text


def test_metrics_are_custom_metrics_of_the_server(
    model: TritonPythonModel, utils: ModuleType
) -> None:
    values = utils.MetricFamily.values
    ok = ("goc_requests", "instance=golden_0_0,model=golden,outcome=ok,plan=fora-2")
    batches = ("goc_batch_images", "instance=golden_0_0,model=golden,plan=fora-2")
    before = sum(values.get(ok, ()))
    model.execute([InferenceRequest(LABEL=[b"1"]), InferenceRequest(LABEL=[b"2", b"3"])])
    deadline = time.monotonic() + 10  # the last request may be counted after its result is there
    while sum(values[ok]) < before + 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sum(values[ok]) == before + 2
    assert values[batches][-1] == 3
    assert values["goc_build_info", next(k[1] for k in values if k[0] == "goc_build_info")] == [1]


@pytest.mark.parametrize(
    ("more", "kind", "message"),
    [
        ({"batch": 0}, UsageError, "max_batch_size must be at least 1"),
        ({"threads": "many"}, UsageError, "the parameters of golden in config.pbtxt"),
        ({"plans": "none"}, UsageError, "the parameters of golden in config.pbtxt"),
        ({"engine_dir": "missing"}, EngineDirError, "/models/golden/missing"),
    ],
)
def test_a_model_that_cannot_load_says_why(
    golden_engine: Path, more: dict[str, Any], kind: type, message: str
) -> None:
    with pytest.raises(kind, match=message):
        TritonPythonModel().initialize(arguments(**{"engine": golden_engine, **more}))


def test_an_instance_on_a_gpu_loads_on_that_gpu(golden_engine: Path) -> None:
    gpu = {"model_instance_kind": "GPU", "model_instance_device_id": "1"}
    with pytest.raises(UsageError, match="backend onnxruntime does not run on device cuda:1"):
        TritonPythonModel().initialize({**arguments(golden_engine), **gpu})


def test_an_instance_of_no_kind_loads_where_the_backend_runs(golden_engine: Path) -> None:
    model = TritonPythonModel()
    model.initialize({**arguments(golden_engine), "model_instance_kind": "MODEL"})
    (response,) = model.execute([InferenceRequest(LABEL=[b"1"])])
    model.finalize()
    assert response.error is None


def test_a_server_without_histograms_is_refused(
    golden_engine: Path, utils: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(utils, "MetricFamily", object)
    with pytest.raises(EnvironmentUnsupportedError, match="has no custom histograms"):
        TritonPythonModel().initialize(arguments(golden_engine))


def test_prompts_are_rows_too(prompt_engine_small: Path) -> None:
    model = TritonPythonModel()
    model.initialize(arguments(prompt_engine_small))
    texts = [b"the digit one", "the digit two — ©".encode()]
    first, second = model.execute(
        [
            InferenceRequest(PROMPT=texts, NEGATIVE_PROMPT=[b"a", b"b"], SEED=[1, 2]),
            InferenceRequest(PROMPT=texts[:1], SEED=[1]),
        ]
    )
    model.finalize()
    with goc_deploy.load(prompt_engine_small, plan="fora:2", backend="onnxruntime") as pipe:
        prompts = [text.decode() for text in texts]
        expected = pipe.generate(prompts=prompts, negative_prompts=["a", "b"], seed=[1, 2])
        np.testing.assert_array_equal(first.outputs["IMAGES"], expected.images)
        expected = pipe.generate(prompts=prompts[:1], seed=[1])
        np.testing.assert_array_equal(second.outputs["IMAGES"], expected.images)
