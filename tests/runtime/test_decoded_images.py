"""Images and previews of an engine directory with a decoder, also from asyncio."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import goc_deploy
from goc_deploy import CancelToken
from goc_deploy.errors import CancelledError, DeadlineError, UsageError, VerificationError
from goc_deploy.runtime.pipeline import Pipeline
from goc_deploy.runtime.step_events import StepEvent

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


def test_previews_are_decoded_on_request_and_the_last_is_the_image(pipe: Pipeline) -> None:
    seen: dict[int, np.ndarray] = {}
    latents: dict[int, np.ndarray] = {}

    def keep(event: StepEvent) -> None:
        if event.step % 2 == 0:
            preview = event.preview()
            assert preview is not None
            seen[event.step], latents[event.step] = preview, event.latents()

    found = pipe.generate(prompts=PROMPTS, seed=2, callback=keep, trajectory=True)
    assert found.trajectory is not None
    assert sorted(seen) == [0, 2, 4]
    for step, values in latents.items():
        np.testing.assert_array_equal(values, found.trajectory[step])
    np.testing.assert_array_equal(seen[4], found.images)
    assert (seen[0] != seen[4]).any()


def test_an_event_has_no_latents_after_its_callback_and_a_part_has_its_own_images(
    pipe: Pipeline,
) -> None:
    events: list[StepEvent] = []
    parts: list[np.ndarray] = []

    def keep(event: StepEvent) -> None:
        events.append(event)
        parts.append(event.part(range(1, 3)).latents())

    found = pipe.generate(prompts=PROMPTS, seed=2, callback=keep)
    np.testing.assert_array_equal(parts[-1], found.latents[1:3])
    assert (events[0].part(range(1, 3)).images, events[0].images) == (2, 3)
    later: list[StepEvent] = []
    pipe.generate(prompts=PROMPTS, callback=later.append)
    with pytest.raises(UsageError, match="overwritten after the callback; read them in it"):
        later[0].latents()


def test_asyncio_gets_what_a_thread_gets_and_a_cancelled_task_ends_its_run(pipe: Pipeline) -> None:
    expected = pipe.generate(prompts=PROMPTS, seed=5).latents
    steps: list[int] = []

    def slow(event: StepEvent) -> None:
        steps.append(event.step)
        time.sleep(0.1)

    async def run() -> np.ndarray:
        task = asyncio.create_task(pipe.agenerate(prompts=PROMPTS, seed=1, callback=slow))
        while not steps:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(DeadlineError):
            await pipe.agenerate(prompts=PROMPTS, deadline=0)
        token = CancelToken()
        token.cancel()
        with pytest.raises(CancelledError):
            await pipe.agenerate(prompts=PROMPTS, cancel=token)
        return (await pipe.agenerate(prompts=PROMPTS, seed=5, deadline=100)).latents

    np.testing.assert_array_equal(asyncio.run(run()), expected)
    assert len(steps) < pipe.plan.steps
