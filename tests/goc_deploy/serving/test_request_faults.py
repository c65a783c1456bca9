"""Odd bodies over HTTP, and an image that is not finite."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path

import numpy as np
import pytest

from goc_deploy.runtime.request import Drawing
from goc_deploy.serving import HostedModel, Service
from tests.goc_deploy.serving.running import GENERATE, Running

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")


@pytest.mark.parametrize(
    ("text", "status", "message"),
    [
        ('"prompt": ""', 200, ""),
        ('"prompt": "   "', 200, ""),
        ('"prompt": "\\ud83d\\ude00"', 200, ""),
        ('"prompt": "a\\u0000b"', 200, ""),
        ('"prompt": "\\ud800"', 400, ""),
        (f'"prompt": "{"x" * 2001}"', 400, "have up to 2001 characters"),
        (f'"prompt": "{"x" * 10**6}"', 413, "more than 65536 bytes"),
        ('"prompt": "a", "negative_prompt": "\\udc00"', 400, ""),
        ('"prompt": "a", "guidance_scale": NaN', 400, "guidance_scale must be"),
        ('"prompt": "a", "guidance_scale": 1e999', 400, "guidance_scale must be"),
        ('"prompt": "a", "guidance_scale": -1', 400, "guidance_scale must be"),
        ('"prompt": "a", "seed": 18446744073709551616', 400, "seed must be within"),
        ('"prompt": "a", "seed": 1.5', 400, "seed"),
        ('"prompt": "a", "deadline": NaN', 400, "deadline must be"),
        ('"prompt": "a", "deadline": Infinity', 200, ""),
        ('"prompt": "a", "size": "27x28"', 400, "does not exist; model prompts has 28x28"),
        ('"prompt": ["a"]', 400, "prompt"),
    ],
)
def test_every_body_is_drawn_or_refused_with_its_reason(
    server: Running, text: str, status: int, message: str
) -> None:
    body = f'{{"model": "prompts", {text}}}'.encode()
    json_type = {"Content-Type": "application/json"}
    answer = server.client.post(GENERATE, content=body, headers=json_type)
    assert answer.status_code == status, answer.text[:300]
    if status != 200:
        assert message in answer.json()["error"]["message"]
    assert server.client.get("/health/ready").status_code == 200


def test_an_image_that_is_not_finite_is_an_error_and_no_black_picture(
    demo_engine: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from goc_deploy.serving.images_api import application
    from goc_deploy.serving.prometheus import PrometheusMetrics

    request, metrics = Drawing.request, PrometheusMetrics()

    def with_bad_noise(drawing: Drawing, part: range, *rest: object) -> object:
        made = request(drawing, part, *rest)
        for row, (seed, _) in zip(made.noise, drawing.noise_keys, strict=True):
            if seed == 66:
                row[:] = 3e38
        return made

    async def ask(service: Service) -> list[httpx.Response]:
        transport = httpx.ASGITransport(application(service, metrics))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            bodies = [{"prompt": "3", "seed": seed} for seed in (65, 66, 67)]
            return list(await asyncio.gather(*(client.post(GENERATE, json=b) for b in bodies)))

    model = HostedModel(demo_engine, ("fora:2",), backend="onnxruntime")
    with Service({"m": model}, metrics=metrics) as service, np.errstate(all="ignore"):
        monkeypatch.setattr(Drawing, "request", with_bad_noise)
        with caplog.at_level(logging.INFO, "goc_deploy"):
            answers = asyncio.run(ask(service))
    logged = {record.request_id for record in caplog.records if hasattr(record, "request_id")}
    assert {answer.headers["x-request-id"] for answer in answers} == logged
    assert len(logged) == 3
    assert [answer.status_code for answer in answers] == [200, 500, 200]
    error = json.loads(answers[1].text)["error"]
    assert (error["type"], error["code"]) == ("server_error", "VerificationError")
    assert "not finite" in error["message"]
    labels = {"model": "m", "plan": "fora-2"}
    assert metrics.registry.get_sample_value("goc_nonfinite_images_total", labels) == 1
