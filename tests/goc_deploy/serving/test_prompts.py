"""A service of a model that draws prompts."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

import goc_deploy
from goc_deploy.errors import UsageError
from goc_deploy.serving import HostedModel, ImageRequest, Service, ServiceLimits

PROMPTS = (["the digit one"], ["the digit two", "the digit three"], ["the digit one"])
NEGATIVES = ([""], ["the digit nine", "a blurred digit"], ["the digit four"])
LIMITS = ServiceLimits(max_delay_seconds=0.5)


def test_prompts_of_several_requests_run_together_with_the_bits_of_each_alone(
    prompt_engine_small: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = HostedModel(prompt_engine_small, ("fora:2",), backend="onnxruntime")
    long = "seven " * 50
    with Service({"digits": model}, limits=LIMITS) as service, caplog.at_level(logging.INFO):
        requests = [
            ImageRequest("digits", prompts=prompts, negative_prompts=negatives, seed=i)
            for i, (prompts, negatives) in enumerate(zip(PROMPTS, NEGATIVES, strict=True))
        ]
        futures = [service.submit(request) for request in requests]
        found = [future.result(60) for future in futures]
        service.generate(ImageRequest("digits", prompts=[long]))
    assert [result.report["batch_images"] for result in found] == [4, 4, 4]
    with goc_deploy.load(prompt_engine_small, plan="fora:2", backend="onnxruntime") as alone:
        for i, result in enumerate(found):
            expected = alone.generate(prompts=PROMPTS[i], negative_prompts=NEGATIVES[i], seed=i)
            np.testing.assert_array_equal(result.latents, expected.latents)
            np.testing.assert_array_equal(result.images, expected.images)
    assert "tokens, the model takes" in caplog.text
    assert "seven" not in caplog.text


@pytest.mark.parametrize("asked", [False, True])
def test_prompts_are_in_the_log_only_if_that_is_asked_for(
    golden_engine: Path, caplog: pytest.LogCaptureFixture, asked: bool
) -> None:
    model = HostedModel(golden_engine, ("fora:2",), backend="onnxruntime")
    request = ImageRequest("m", prompts=["a secret"], request_id="mine")
    with (
        caplog.at_level(logging.DEBUG),
        Service({"m": model}, log_prompts=asked) as service,
        pytest.raises(UsageError, match="no text encoder"),
    ):
        service.generate(request)
    (record,) = [one for one in caplog.records if getattr(one, "request_id", "") == "mine"]
    assert getattr(record, "prompts", None) == (["a secret"] if asked else None)
    shown = [one for one in caplog.records if "a secret" in str(vars(one))]
    assert shown == ([record] if asked else [])
