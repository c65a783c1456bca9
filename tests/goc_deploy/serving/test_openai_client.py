"""The official client of OpenAI, which knows nothing of this server."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import goc_deploy
from tests.goc_deploy.serving.running import TOKEN, Running, pixels

openai = pytest.importorskip("openai")


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=TOKEN, max_retries=0) as opened:
        yield opened


def cancelled(server: Running) -> float:
    """Requests that were cancelled so far."""
    lines = server.client.get("/metrics").text.splitlines()
    found = [line for line in lines if 'outcome="cancelled"' in line and "_total" in line]
    return sum(float(line.split()[-1]) for line in found)


def test_four_images_of_a_label_are_those_of_the_library(client: Any, demo_engine: Path) -> None:
    assert sorted(model.id for model in client.models.list()) == ["digits", "prompts"]
    answer = client.images.generate(
        model="digits",
        prompt="7",
        n=4,
        size="28x28",
        background="opaque",
        moderation="low",
        output_compression=100,
        output_format="png",
        quality="low",
        style="vivid",
        user="a person",
        extra_body={"seed": 1, "plan": "fora:2"},
    )
    assert (answer.background, answer.output_format, answer.size) == ("opaque", "png", "28x28")
    assert answer._request_id
    with goc_deploy.load(demo_engine, plan="fora:2", backend="onnxruntime") as pipe:
        expected = pipe.generate([7] * 4, seed=1).images
    for item, image in zip(answer.data, expected, strict=True):
        np.testing.assert_array_equal(pixels(item.b64_json), image[..., 0])


def test_an_image_of_a_prompt_is_that_of_the_library(
    client: Any, prompt_engine_small: Path
) -> None:
    answer = client.images.generate(
        model="prompts",
        prompt="the digit two",
        response_format="b64_json",
        extra_body={"seed": 1, "negative_prompt": "the digit one"},
    )
    with goc_deploy.load(prompt_engine_small, plan="fora:2", backend="onnxruntime") as pipe:
        found = pipe.generate(prompts=["the digit two"], negative_prompts=["the digit one"], seed=1)
    np.testing.assert_array_equal(pixels(answer.data[0].b64_json), found.images[0][..., 0])


def test_a_stream_has_partial_images_and_the_image(client: Any) -> None:
    fields = {"model": "digits", "prompt": "7", "extra_body": {"seed": 1}}
    answer = client.images.generate(**fields)
    events = list(client.images.generate(stream=True, partial_images=3, **fields))
    assert [event.type for event in events] == [
        *["image_generation.partial_image"] * 3,
        "image_generation.completed",
    ]
    for event in events:
        fields_of_openai = {name for name, f in type(event).model_fields.items() if f.is_required()}
        assert fields_of_openai <= event.model_fields_set
        assert (event.size, event.output_format) == ("28x28", "png")
    assert [event.partial_image_index for event in events[:3]] == [0, 1, 2]
    assert events[3].b64_json == answer.data[0].b64_json


def test_wrong_requests_are_the_errors_that_the_client_knows(client: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no model 'dall-e-3'") as unknown:
        client.images.generate(model="dall-e-3", prompt="7")
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError, match="size '1024x1024' does not exist"):
        client.images.generate(model="digits", prompt="7", size="1024x1024")
    stranger = client.with_options(api_key="wrong")
    with pytest.raises(openai.AuthenticationError, match="bearer token is wrong"):
        stranger.images.generate(model="digits", prompt="7")


def drop_after_a_moment(client: Any) -> None:
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.05).images.generate(
            model="digits", prompt="1", n=4, extra_body={"plan": "none"}
        )


def drop_after_the_first_event(client: Any) -> None:
    stream = client.images.generate(
        model="digits", prompt="1", stream=True, partial_images=3, extra_body={"plan": "none"}
    )
    assert next(iter(stream)).type == "image_generation.partial_image"
    stream.close()


@pytest.mark.parametrize("drop", [drop_after_a_moment, drop_after_the_first_event])
def test_a_connection_that_is_dropped_cancels_its_request_and_no_other(
    client: Any, server: Running, drop: Callable[[Any], None]
) -> None:
    fields = {"model": "digits", "prompt": "5", "extra_body": {"seed": 3, "plan": "none"}}
    alone = client.images.generate(**fields).data[0].b64_json
    before = cancelled(server)
    with ThreadPoolExecutor(4) as pool:
        others = [pool.submit(client.images.generate, n=4, **fields) for _ in range(4)]
        drop(client)
        assert [future.result().data[0].b64_json for future in others] == [alone] * 4
    deadline = time.monotonic() + 60
    while cancelled(server) == before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert cancelled(server) == before + 1


def test_the_client_comes_back_when_the_queue_has_room(demo_engine: Path) -> None:
    limits = ("--queued-images", 4, "--images-per-request", 4)
    running = Running(demo_engine, "--backend", "onnxruntime", "--plan", "fora:2", *limits)
    running.wait()

    def ask(client: Any, seed: int) -> str:
        answer = client.images.generate(model="engine", prompt="3", extra_body={"seed": seed})
        return answer.data[0].b64_json

    with openai.OpenAI(base_url=f"{running.url}/v1", api_key=TOKEN, max_retries=0) as client:
        alone = [ask(client, seed) for seed in range(8)]
        with ThreadPoolExecutor(32) as pool:
            hasty = [pool.submit(ask, client, i % 8) for i in range(32)]
            errors = [error for future in hasty if (error := future.exception()) is not None]
            assert errors
            assert {type(error) for error in errors} == {openai.RateLimitError}
            assert all(int(error.response.headers["retry-after"]) >= 1 for error in errors)
            patient = client.with_options(max_retries=60)
            found = list(pool.map(lambda i: ask(patient, i % 8), range(32)))
    assert found == alone * 4
    assert running.stop() == (0, "")
