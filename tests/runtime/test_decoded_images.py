"""Images of an engine directory with a decoder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import goc_deploy
from goc_deploy.errors import VerificationError
from goc_deploy.runtime.pipeline import Pipeline

PROMPTS = ["the digit one", "the digit two", "the digit three"]


@pytest.fixture(scope="module")
def pipe(prompt_engine_small: Path) -> Iterator[Pipeline]:
    with goc_deploy.load(prompt_engine_small, plan="fora:2", backend="onnxruntime") as loaded:
        yield loaded


def test_an_image_that_is_not_finite_is_black_and_the_others_are_decoded(pipe: Pipeline) -> None:
    spec = pipe.spec
    start = np.random.default_rng(0).standard_normal((3, spec.channels, spec.side, spec.side))
    good = pipe.generate(prompts=PROMPTS, latents=start)
    start[1] = 3e38
    with np.errstate(all="ignore"):
        found = pipe.generate(prompts=PROMPTS, latents=start, on_nonfinite="mark")
    assert good.images is not None
    assert found.images is not None
    assert {i: type(error) for i, error in found.errors.items()} == {1: VerificationError}
    assert not found.images[1].any()
    np.testing.assert_array_equal(found.images[[0, 2]], good.images[[0, 2]])
