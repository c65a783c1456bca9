"""What clients of a real tritonserver meet; runs in the environment of the server.

``test_triton.py`` starts it with the repository in ``GOC_TRITON_REPOSITORY``: the demo model as
``digits`` with a queue of 8 requests, and a model of texts as ``prompts``. The engine directories
are beside the repository.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as over_grpc
import tritonclient.http as over_http
from tritonclient.utils import InferenceServerException

import goc_deploy
from goc_deploy.runtime.pipeline import Pipeline
from tests.serving_hosts.triton_server import TritonServer

REPOSITORY = Path(os.environ["GOC_TRITON_REPOSITORY"])
TYPES = {"SEED": ("UINT64", np.uint64), "GUIDANCE_SCALE": ("FP32", np.float32)}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    with TritonServer(REPOSITORY, tmp_path_factory.mktemp("triton")) as running:
        yield running
    assert running.process.returncode == 0, running.log.read_text()


@pytest.fixture(scope="module")
def http(server: TritonServer) -> Iterator[Any]:
    client = over_http.InferenceServerClient(server.http, concurrency=16, network_timeout=120)
    yield client
    client.close()


@pytest.fixture(scope="module")
def grpc(server: TritonServer) -> Iterator[Any]:
    client = over_grpc.InferenceServerClient(server.grpc)
    yield client
    client.close()


@pytest.fixture(scope="module")
def alone() -> Iterator[dict[str, Pipeline]]:
    names = ["none", "fora:2"]
    pipes = goc_deploy.load_plans(
        REPOSITORY.parent / "digits", names, backend="onnxruntime", threads=1
    )
    yield dict(zip(names, pipes, strict=True))
    for pipe in pipes:
        pipe.close()


def inputs(library: Any, **rows: list[Any]) -> list[Any]:
    made = []
    for name, values in rows.items():
        kind, dtype = TYPES.get(name, ("BYTES", object))
        tensor = library.InferInput(name, [len(values), 1], kind)
        encoded = [one.encode() if isinstance(one, str) else one for one in values]
        tensor.set_data_from_numpy(np.array(encoded, dtype).reshape(-1, 1))
        made.append(tensor)
    return made


class Burst:
    """Requests over gRPC that are sent at once."""

    def __init__(self, grpc: Any, requests: list[dict[str, Any]], **more: Any) -> None:
        self.found: list[Any] = [None] * len(requests)
        self._left, self._done = len(requests), threading.Event()
        self._lock = threading.Lock()
        self.calls = [
            grpc.async_infer("digits", inputs(over_grpc, **one), self._keep(i), **more)
            for i, one in enumerate(requests)
        ]

    def _keep(self, index: int) -> Any:
        def keep(result: Any, error: Any) -> None:
            with self._lock:
                self.found[index] = result if error is None else error
                self._left -= 1
                if not self._left:
                    self._done.set()

        return keep

    def wait(self) -> list[Any]:
        assert self._done.wait(120), self.found
        return self.found


def counted(server: TritonServer, metric: str, **labels: str) -> float:
    """The sum of a metric over all label sets that have these labels."""
    total = 0.0
    for line in server.metrics().splitlines():
        match = re.fullmatch(metric + r"(?:\{(.*)\})? ([0-9.e+-]+)", line)
        if match and all(f'{key}="{value}"' in (match[1] or "") for key, value in labels.items()):
            total += float(match[2])
    return total


def statistics(http: Any) -> tuple[int, int]:
    """Images and executions of the model digits."""
    (model,) = http.get_inference_statistics("digits")["model_stats"]
    return int(model["inference_count"]), int(model["execution_count"])


def test_models_are_warm_when_the_server_is_ready(server: TritonServer, http: Any) -> None:
    assert all(http.is_model_ready(name) for name in ("digits", "prompts"))
    for name in ("digits", "prompts"):
        assert counted(server, "goc_requests", model=name, outcome="ok") == 1
    metadata = http.get_model_metadata("digits")
    assert [one["name"] for one in metadata["outputs"]] == ["IMAGES", "LATENTS", "USED_SEED"]
    config = http.get_model_config("digits")
    assert config["max_batch_size"] == 50
    assert config["dynamic_batching"]["default_queue_policy"]["max_queue_size"] == 8


def test_http_and_grpc_give_the_bits_of_a_pipeline(
    http: Any, grpc: Any, alone: dict[str, Pipeline]
) -> None:
    rows = {"LABEL": ["3", "7"], "SEED": [5, 2**64 - 1], "GUIDANCE_SCALE": [2.0, 4.5]}
    for plan, pipe in alone.items():
        expected = pipe.generate([3, 7], seed=[5, 2**64 - 1], cfg_scale=[2.0, 4.5])
        for client, library in ((http, over_http), (grpc, over_grpc)):
            found = client.infer("digits", inputs(library, **rows), parameters={"plan": plan})
            np.testing.assert_array_equal(found.as_numpy("IMAGES"), expected.images)
            np.testing.assert_array_equal(found.as_numpy("LATENTS"), expected.latents)
            np.testing.assert_array_equal(found.as_numpy("USED_SEED"), [[5], [2**64 - 1]])


def test_only_the_outputs_that_are_asked_for_are_sent(http: Any) -> None:
    asked = [over_http.InferRequestedOutput("IMAGES", binary_data=True)]
    found = http.infer("digits", inputs(over_http, LABEL=["1"]), outputs=asked)
    assert [one["name"] for one in found.get_response()["outputs"]] == ["IMAGES"]


def test_requests_at_once_run_together_and_errors_stay_with_their_requests(
    http: Any, grpc: Any, alone: dict[str, Pipeline]
) -> None:
    time.sleep(1)  # a server counts a request after it has answered it
    before = statistics(http)
    wanted = [{"LABEL": [str(i)], "SEED": [i]} for i in range(7)]
    *found, wrong = Burst(grpc, [*wanted, {"LABEL": ["10"], "SEED": [1]}]).wait()
    for i, result in enumerate(found):
        expected = alone["fora:2"].generate([i], seed=i)
        np.testing.assert_array_equal(result.as_numpy("IMAGES"), expected.images)
    assert wrong.status() == "StatusCode.INVALID_ARGUMENT"
    assert "label 10" in wrong.message()
    images, executions = (
        after - earlier for after, earlier in zip(statistics(http), before, strict=True)
    )
    assert 7 <= images <= 8
    assert executions < images


@pytest.mark.parametrize(
    ("rows", "parameters", "message"),
    [
        ({"LABEL": ["-1"]}, {}, "label -1"),
        ({"LABEL": [b"\xff"]}, {}, "row 0 of LABEL is not UTF-8"),
        ({"LABEL": [""]}, {}, "must be a whole number"),
        ({"LABEL": ["1"], "GUIDANCE_SCALE": [float("nan")]}, {}, "GUIDANCE_SCALE must be"),
        ({"LABEL": ["1"]}, {"plan": "fora:9"}, "there is no plan 'fora:9'"),
        ({"LABEL": ["1"] * 51}, {}, "batch-size must be <= 50"),
        ({"SEED": [1]}, {}, "the request has no input LABEL"),
        ({"LABEL": ["1", "2"], "SEED": [1]}, {}, "batch size does not match"),
    ],
)
def test_a_wrong_request_is_refused_over_http(
    http: Any, rows: dict[str, list[Any]], parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises(InferenceServerException, match=re.escape(message)) as refused:
        http.infer("digits", inputs(over_http, **rows), parameters=parameters)
    assert refused.value.status() == "400"


def test_a_request_that_runs_is_cancelled_and_the_next_one_is_served(
    server: TritonServer, http: Any, grpc: Any
) -> None:
    before = counted(server, "goc_requests", model="digits", outcome="cancelled")
    large = {"LABEL": ["1"] * 50}
    burst = Burst(grpc, [large], parameters={"plan": "none"})
    deadline = time.monotonic() + 60
    while not counted(server, "goc_in_flight_requests"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    burst.calls[0].cancel()
    (error,) = burst.wait()
    assert error.status() == "StatusCode.CANCELLED"
    http.infer("digits", inputs(over_http, LABEL=["1"]))
    assert counted(server, "goc_requests", model="digits", outcome="cancelled") == before + 1
    assert counted(server, "goc_images", model="digits", plan="none") < 50


def test_a_timeout_ends_a_request(grpc: Any) -> None:
    with pytest.raises(InferenceServerException) as late:
        grpc.infer(
            "digits",
            inputs(over_grpc, LABEL=["1"] * 50),
            parameters={"plan": "none"},
            timeout=300_000,
        )
    assert late.value.status() == "StatusCode.UNAVAILABLE"
    assert "deadline of 0.3 s" in late.value.message()


def test_a_full_queue_refuses_at_once(grpc: Any, alone: dict[str, Pipeline]) -> None:
    found = Burst(grpc, [{"LABEL": [str(i % 10)], "SEED": [i]} for i in range(30)]).wait()
    refused = [one for one in found if isinstance(one, InferenceServerException)]
    assert 0 < len(refused) < 30
    for one in refused:
        assert one.status() == "StatusCode.UNAVAILABLE"
        assert "maximum queue size" in one.message()
    served = next(i for i, one in enumerate(found) if one not in refused)
    expected = alone["fora:2"].generate([served % 10], seed=served)
    np.testing.assert_array_equal(found[served].as_numpy("IMAGES")[0], expected.images[0])


def test_prompts_are_drawn(http: Any, grpc: Any) -> None:
    texts = ["the digit one", "the digit two — ©"]
    with goc_deploy.load(
        REPOSITORY.parent / "prompts", plan="fora:2", backend="onnxruntime", threads=1
    ) as pipe:
        expected = pipe.generate(prompts=texts, negative_prompts=["a", "b"], seed=[1, 2])
    rows = {"PROMPT": texts, "NEGATIVE_PROMPT": ["a", "b"], "SEED": [1, 2]}
    for client, library in ((http, over_http), (grpc, over_grpc)):
        found = client.infer("prompts", inputs(library, **rows))
        np.testing.assert_array_equal(found.as_numpy("IMAGES"), expected.images)
    with pytest.raises(InferenceServerException, match="have up to 2001 characters"):
        http.infer("prompts", inputs(over_http, PROMPT=["x" * 2001]))


def test_metrics_of_all_models_stand_beside_those_of_the_server(server: TritonServer) -> None:
    assert counted(server, "nv_inference_request_success", model="digits") > 0
    assert counted(server, "goc_batch_images_sum", model="digits", instance="digits_0_0") > 0
    for name in ("digits", "prompts"):
        assert counted(server, "goc_build_info", model=name, backend="onnxruntime") == 1
    assert counted(server, "goc_requests", outcome="deadline") == 1
