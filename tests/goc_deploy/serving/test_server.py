"""goc-serve as clients meet it."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import goc_deploy
from tests.conftest import Command
from tests.goc_deploy.serving.running import GENERATE, HEADERS, TOKEN, Running, pixels

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")


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


@pytest.mark.parametrize(
    ("fields", "status", "message"),
    [
        ({"prompt": "a cat"}, 400, "must be a whole number"),
        ({"prompt": "1,2"}, 400, "is one class"),
        ({"prompt": "10"}, 400, "label 10"),
        ({"n": 5}, 400, r"1..4 images, got 5"),
        ({"n": 10**18}, 400, "1..4 images, got 1000000000000000000"),
        ({"n": 0}, 400, "n: Input should be greater than or equal to 1"),
        ({"n": 2, "stream": True}, 400, "n=1"),
        ({"response_format": "url"}, 400, "response_format: Input should be 'b64_json'"),
        ({"guidence_scale": 3.0}, 400, "there is no field 'guidence_scale'"),
        ({"background": "transparent"}, 400, "background: Input should be 'auto' or 'opaque'"),
        ({"negative_prompt": "4"}, 400, "model digits has no text encoder, so it takes no"),
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
    json_type = "application/json"
    for content, kind in ((b"{", "text/plain"), (b"{", json_type), (b"\xff", json_type)):
        answer = server.client.post(GENERATE, content=content, headers={"content-type": kind})
        assert answer.status_code == 400
        assert answer.json()["error"]["message"]
    assert server.client.post(GENERATE, content=iter([b"{}"])).status_code == 411


def test_paths_and_methods_that_are_not_there_are_refused_in_the_form_of_openai(
    server: Running,
) -> None:
    edits, wrong_method = "/v1/images/edits", server.client.get(GENERATE)
    for answer, status, asked in (
        (server.client.post(edits, json={}), 404, f"POST {edits}"),
        (wrong_method, 405, f"GET {GENERATE}"),
    ):
        assert answer.status_code == status
        error = answer.json()["error"]
        assert (error["code"], error["type"]) == ("unknown_url", "invalid_request_error")
        assert error["message"].startswith(f"there is no {asked}; ")
    assert wrong_method.headers["allow"] == "POST"


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
    described = server.client.get("/openapi.json").json()
    generate = described["paths"][GENERATE]["post"]
    assert set(generate["responses"]) == {"200", "default"}
    error = generate["responses"]["default"]["content"]["application/json"]["schema"]["$ref"]
    assert error == "#/components/schemas/ErrorAnswer"
    assert set(generate["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    assert generate["security"] == [{"HTTPBearer": []}]
    assert "security" not in described["paths"]["/health/live"]["get"]


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


def accepted(running: Running) -> float:
    """Requests of eight images that were accepted so far."""
    page = running.client.get("/metrics").text
    names = r"(goc_in_flight_requests|goc_queued_images|goc_requests_total\{.*\})"
    found = {name: float(value) for name, value in re.findall(rf"(?m)^{names} (\S+)$", page)}
    found["goc_queued_images"] /= 8
    return sum(found.values())


def test_sigterm_ends_accepted_requests_and_refuses_new_ones(demo_engine: Path) -> None:
    words = ("--backend", "onnxruntime", "--plan", "none", "--drain-seconds", 120)
    running = Running(demo_engine, *words)
    running.wait()
    with ThreadPoolExecutor(4) as pool, httpx.Client(base_url=running.url, timeout=120) as other:
        body = {"prompt": "1", "n": 8}
        busy = [pool.submit(other.post, GENERATE, json=body, headers=HEADERS) for _ in range(3)]
        deadline = time.monotonic() + 60
        while accepted(running) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        code, printed = running.stop()
        assert [future.result().status_code for future in busy] == [200] * 3
    assert (code, printed) == (0, "")


@pytest.mark.parametrize("what", ["half a body", "a run that is too long"])
def test_sigterm_waits_for_no_client_longer_than_it_says(demo_engine: Path, what: str) -> None:
    running = Running(
        demo_engine, "--backend", "onnxruntime", "--plan", "none", "--drain-seconds", 0.5
    )
    running.wait()
    body = json.dumps({"prompt": "1", "n": 16})
    head = f"POST {GENERATE} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    sent = head + (body[:5] if what == "half a body" else body)
    count = 1 if what == "half a body" else 16
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            one = socket.create_connection(("127.0.0.1", int(running.url.rpartition(":")[2])))
            stack.enter_context(contextlib.closing(one)).sendall(sent.encode())
        time.sleep(0.5)
        started = time.monotonic()
        code, printed = running.stop()
        assert time.monotonic() - started < 20
        assert one.recv(100).startswith(b"HTTP/1.1 503 ")
    assert code == 0
    assert "Traceback" not in printed


def test_sigterm_does_not_wait_for_answers_that_nobody_reads(demo_engine: Path) -> None:
    running = Running(demo_engine, "--backend", "onnxruntime", "--plan", "none")
    running.wait()
    asked = f"GET /metrics HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n\r\n"
    port = int(running.url.rpartition(":")[2])
    with contextlib.closing(socket.create_connection(("127.0.0.1", port), 2)) as deaf:
        with contextlib.suppress(TimeoutError):
            deaf.sendall(asked.encode() * 3000)
        time.sleep(1)  # until the buffers of the connection are full
        started = time.monotonic()
        code, printed = running.stop()
        assert time.monotonic() - started < 20
    assert code == 0
    assert "Traceback" not in printed


def test_a_directory_that_cannot_be_loaded_ends_the_server(tmp_path: Path) -> None:
    running = Running(tmp_path / "missing", "--backend", "onnxruntime")
    out, err = running.process.communicate(timeout=120)
    assert (running.process.returncode, out) == (4, "")
    assert "missing" in err
    assert "Traceback" not in err


def test_an_address_that_is_in_use_ends_the_server(command: Command, golden_engine: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        words = (golden_engine, "--backend", "onnxruntime", "--plan", "none", "--port", port)
        done = command("goc-serve", *words, code=5)
    assert f"127.0.0.1:{port} cannot be used; choose another --port" in done.stderr
    assert "Traceback" not in done.stderr


def test_bounds_that_contradict_each_other_are_refused_by_their_flags(
    command: Command, golden_engine: Path
) -> None:
    done = command("goc-serve", golden_engine, "--queued-images", 4, code=2)
    assert "--queued-images is 4, too few for a request of 16 images" in done.stderr
    assert "see --images-per-request" in done.stderr
