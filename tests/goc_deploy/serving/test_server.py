"""goc-serve as clients meet it."""

from __future__ import annotations

import base64
import io
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import goc_deploy
from tests.conftest import command_words

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

TOKEN = "a-secret"
HEADERS = {"Authorization": f"Bearer {TOKEN}"}
GENERATE = "/v1/images/generations"


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


class Running:
    """A server in a process of its own."""

    def __init__(self, *arguments: object) -> None:
        self.url = f"http://127.0.0.1:{(port := free_port())}"
        words = [*command_words("goc-serve"), *map(str, arguments), "--port", str(port)]
        environment = {**os.environ, "GOC_SERVE_TOKEN": TOKEN}
        self.process = subprocess.Popen(
            words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.client = httpx.Client(base_url=self.url, headers=HEADERS, timeout=120)

    def wait(self, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.process.stderr
            try:
                if self.client.get("/health/ready").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        raise AssertionError("the server is not ready")

    def stop(self) -> tuple[int, str]:
        """Send SIGTERM; the exit code, and what was printed on both streams."""
        self.client.close()
        self.process.send_signal(signal.SIGTERM)
        out, err = self.process.communicate(timeout=120)
        return self.process.returncode, out + err


@pytest.fixture(scope="module")
def server(
    demo_engine: Path, prompt_engine_small: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("models")
    (folder / "digits").symlink_to(demo_engine)
    (folder / "prompts").symlink_to(prompt_engine_small)
    backend = ("--backend", "onnxruntime", "--plan", "none", "--plan", "fora:2")
    running = Running(folder / "digits", folder / "prompts", *backend, "--images-per-request", 4)
    running.wait()
    yield running
    code, printed = running.stop()
    assert (code, printed) == (0, "")


def pixels(text: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def ask(server: Running, **fields: Any) -> Any:
    return server.client.post(GENERATE, json={"model": "digits", "prompt": "3", **fields})


def test_labels_and_prompts_are_drawn_with_the_pixels_of_the_library(
    server: Running, demo_engine: Path, prompt_engine_small: Path
) -> None:
    answer = ask(server, n=4, seed=5, plan="fora:2", guidance_scale=3.0).json()
    with goc_deploy.load(demo_engine, plan="fora:2", backend="onnxruntime") as pipe:
        expected = pipe.generate([3] * 4, seed=5, cfg_scale=3.0).images
    assert (answer["seed"], answer["plan"], answer["model"]) == (5, "fora-2", "digits")
    for item, image in zip(answer["data"], expected, strict=True):
        np.testing.assert_array_equal(pixels(item["b64_json"]), image[..., 0])
    text = {"prompt": "the digit two", "negative_prompt": "the digit one", "seed": 1}
    answer = ask(server, model="prompts", size="28x28", **text).json()
    with goc_deploy.load(prompt_engine_small, plan="fora:2", backend="onnxruntime") as pipe:
        found = pipe.generate(prompts=["the digit two"], negative_prompts=["the digit one"], seed=1)
    np.testing.assert_array_equal(pixels(answer["data"][0]["b64_json"]), found.images[0][..., 0])


def test_the_client_of_openai_gets_images_and_a_stream(server: Running) -> None:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=TOKEN, max_retries=0) as client:
        assert sorted(model.id for model in client.models.list()) == ["digits", "prompts"]
        answer = client.images.generate(model="digits", prompt="7", n=2, extra_body={"seed": 1})
        assert [pixels(item.b64_json).shape for item in answer.data] == [(28, 28)] * 2
        events = list(
            client.images.generate(
                model="digits", prompt="7", stream=True, partial_images=3, extra_body={"seed": 1}
            )
        )
        assert [event.type for event in events] == [
            *["image_generation.partial_image"] * 3,
            "image_generation.completed",
        ]
        assert [event.partial_image_index for event in events[:3]] == [0, 1, 2]
        assert events[3].b64_json == answer.data[0].b64_json
        with pytest.raises(openai.NotFoundError, match="there is no model 'dall-e-3'"):
            client.images.generate(model="dall-e-3", prompt="7")
        with pytest.raises(openai.BadRequestError, match="size '1024x1024' does not exist"):
            client.images.generate(model="digits", prompt="7", size="1024x1024")


@pytest.mark.parametrize(
    ("fields", "status", "message"),
    [
        ({"prompt": "a cat"}, 400, "must be a whole number"),
        ({"prompt": "1,2"}, 400, "is one class"),
        ({"prompt": "10"}, 400, "label 10"),
        ({"n": 5}, 400, r"1..4 images, got 5"),
        ({"n": 0}, 400, "n: Input should be greater than or equal to 1"),
        ({"n": 2, "stream": True}, 400, "n=1"),
        ({"response_format": "url"}, 400, "response_format: Input should be 'b64_json'"),
        ({"plan": "fora:5"}, 400, "there is no plan 'fora:5'; this model has none, fora-2"),
        ({"seed": -1}, 400, "seed must be within"),
        ({"model": "other"}, 404, "there is no model 'other'; there are digits, prompts"),
        ({"model": None}, 404, "there is no model 'None'"),
        ({"deadline": 0}, 504, "within its deadline of 0 s"),
        ({"prompt": "x" * 70000}, 413, "more than 65536 bytes"),
    ],
)
def test_what_is_wrong_is_said_in_the_form_of_openai(
    server: Running, fields: dict, status: int, message: str
) -> None:
    answer = ask(server, **fields)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert message in error["message"]


def test_a_body_that_is_no_json_or_has_no_length_is_refused(server: Running) -> None:
    answer = server.client.post(GENERATE, content=b"{", headers={"content-type": "text/plain"})
    assert answer.status_code == 400
    assert "error" in answer.json()
    assert server.client.post(GENERATE, content=iter([b"{}"])).status_code == 411


def test_only_health_is_open_without_the_token(server: Running) -> None:
    with httpx.Client(base_url=server.url, headers={"Authorization": "Bearer wrong"}) as client:
        for path in ("/v1/models", "/metrics", "/openapi.json"):
            answer = client.get(path)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        assert client.get("/health/live").json() == {"status": "live"}
        ready = client.get("/health/ready").json()
    assert (ready["state"], sorted(ready["models"])) == ("ready", ["digits", "prompts"])


def test_models_and_metrics_describe_what_is_served(server: Running) -> None:
    ask(server)
    digits, prompts = server.client.get("/v1/models").json()["data"]
    assert (digits["id"], digits["size"], digits["takes"]) == ("digits", "28x28", "class")
    assert (prompts["plans"], prompts["takes"]) == (["none", "fora-2"], "prompt")
    page = server.client.get("/metrics").text
    assert 'goc_requests_total{model="digits",outcome="ok",plan="fora-2"}' in page
    paths = server.client.get("/openapi.json").json()["paths"]
    assert GENERATE in paths


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_is_gone_cancels_its_request(server: Running, stream: bool) -> None:
    def cancelled() -> float:
        lines = server.client.get("/metrics").text.splitlines()
        found = [line for line in lines if 'outcome="cancelled"' in line and "_total" in line]
        return sum(float(line.split()[-1]) for line in found)

    before = cancelled()
    fields = {"model": "digits", "prompt": "1", "plan": "none", "stream": stream}
    with ThreadPoolExecutor(8) as pool:
        busy = [pool.submit(ask, server, n=4, plan="none", seed=i) for i in range(6)]
        time.sleep(0.2)
        with pytest.raises(httpx.ReadTimeout):  # noqa: SIM117
            with httpx.Client(base_url=server.url, headers=HEADERS, timeout=0.05) as hasty:
                hasty.post(GENERATE, json=fields)
        assert all(future.result().status_code == 200 for future in busy)
    deadline = time.monotonic() + 60
    while cancelled() == before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert cancelled() == before + 1


def test_sigterm_ends_accepted_requests_and_refuses_new_ones(demo_engine: Path) -> None:
    running = Running(demo_engine, "--backend", "onnxruntime", "--plan", "none")
    running.wait()
    with ThreadPoolExecutor(4) as pool, httpx.Client(base_url=running.url, timeout=120) as other:
        body = {"prompt": "1", "n": 8}
        busy = [pool.submit(other.post, GENERATE, json=body, headers=HEADERS) for _ in range(3)]
        time.sleep(0.3)
        code, printed = running.stop()
        assert [future.result().status_code for future in busy] == [200] * 3
    assert (code, printed) == (0, "")


def test_a_directory_that_cannot_be_loaded_ends_the_server(tmp_path: Path) -> None:
    running = Running(tmp_path / "missing", "--backend", "onnxruntime")
    out, err = running.process.communicate(timeout=120)
    assert (running.process.returncode, out) == (4, "")
    assert "missing" in err
    assert "Traceback" not in err
