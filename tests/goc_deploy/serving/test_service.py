from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import goc_deploy
from goc_deploy.cancellation import CancelToken
from goc_deploy.errors import (
    CancelledError,
    DeadlineError,
    GocError,
    NotReadyError,
    OverloadedError,
    UsageError,
    VerificationError,
)
from goc_deploy.runtime.pipeline import Pipeline
from goc_deploy.runtime.request import Drawing
from goc_deploy.runtime.results import Result
from goc_deploy.runtime.step_events import StepEvent
from goc_deploy.serving import HostedModel, ImageRequest, Service, ServiceLimits

SLOW = ServiceLimits(max_delay_seconds=0.5)


def hosted(engine: Path, *plans: str) -> HostedModel:
    return HostedModel(engine, plans or ("none", "fora:2"), backend="onnxruntime")


@pytest.fixture(scope="module")
def service(golden_engine: Path) -> Iterator[Service]:
    with Service({"golden": hosted(golden_engine)}, limits=SLOW) as started:
        yield started


@pytest.fixture(scope="module")
def alone(golden_engine: Path) -> Iterator[dict[str, Pipeline]]:
    names = ["none", "fora:2"]
    pipes = goc_deploy.load_plans(golden_engine, names, backend="onnxruntime")
    yield dict(zip(names, pipes, strict=True))
    for pipe in pipes:
        pipe.close()


class Hold:
    """A callback that keeps a run from going on until it is let go."""

    def __init__(self) -> None:
        self.running, self.go = threading.Event(), threading.Event()
        self.steps = 0

    def __call__(self, _event: StepEvent) -> None:
        self.steps += 1
        self.running.set()
        self.go.wait(60)


def test_requests_run_together_and_get_what_each_gets_alone(
    service: Service, alone: dict[str, Pipeline]
) -> None:
    requests = [
        ImageRequest("golden", "fora:2", labels=[i % 10] * (1 + i % 3), seed=i, cfg_scale=2.0 + i)
        for i in range(6)
    ]
    futures = [service.submit(request) for request in requests]
    for request, future in zip(requests, futures, strict=True):
        found = future.result(60)
        expected = alone["fora:2"].generate(
            request.labels, seed=request.seed, cfg_scale=request.cfg_scale
        )
        np.testing.assert_array_equal(found.latents, expected.latents)
        assert found.report["batch_images"] == 12
        assert found.report["images"] == len(request.labels or ())
        assert found.errors == {}


def test_only_compatible_requests_run_together(service: Service) -> None:
    same = {"labels": [1], "seed": 3}
    different = [
        {"plan": "none", **same},
        {"plan": "fora:2", **same},
        {"plan": "fora:2", "cfg_scale": 1.0, **same},
        {"plan": "fora:2", "cfg_channels": 1, **same},
    ]
    futures = [service.submit(ImageRequest("golden", **more)) for more in (*different, *different)]
    assert [future.result(60).report["batch_images"] for future in futures] == [2] * 8


def test_requests_that_arrive_at_once_run_together_without_a_delay(
    golden_engine: Path, alone: dict[str, Pipeline]
) -> None:
    limits = ServiceLimits(queued_images=6, images_per_request=4, max_delay_seconds=0)
    requests = [ImageRequest("m", "fora:2", labels=[i, i], seed=i) for i in range(3)]
    requests.insert(1, ImageRequest("m", labels=[10]))
    requests.append(ImageRequest("m", labels=[4]))
    with Service({"m": hosted(golden_engine)}, limits=limits) as service:
        first, wrong, second, third, late = service.submit_many(requests)
        with pytest.raises(UsageError, match="label 10"):
            wrong.result(60)
        with pytest.raises(OverloadedError, match="6 images wait already"):
            late.result(60)
        for i, future in enumerate((first, second, third)):
            found = future.result(60)
            assert found.report["batch_images"] == 6
            expected = alone["fora:2"].generate([i, i], seed=i)
            np.testing.assert_array_equal(found.latents, expected.latents)
        assert service.submit_many([]) == []
        assert service.drain(60)
        assert service.health().queued == 0


def test_random_load_with_cancels_changes_no_other_result(
    service: Service, alone: dict[str, Pipeline]
) -> None:
    def ask(i: int) -> tuple[int, Result | GocError]:
        token = CancelToken()
        if i % 3 == 0:
            threading.Timer(0.02 * (i % 7), token.cancel).start()
        plan = ("none", "fora:2")[i % 2]
        try:
            return i, service.generate(
                ImageRequest("golden", plan, labels=[i % 10], seed=i, cancel=token)
            )
        except CancelledError as error:
            return i, error

    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(ask, range(48)))
    kept = [(i, result) for i, result in found if isinstance(result, Result)]
    assert 32 <= len(kept) < 48
    for i, result in kept:
        expected = alone[("none", "fora:2")[i % 2]].generate([i % 10], seed=i)
        np.testing.assert_array_equal(result.images, expected.images)
        np.testing.assert_array_equal(result.latents, expected.latents)


def test_the_default_plan_is_the_first_that_caches(service: Service) -> None:
    assert list(service.models["golden"].plans) == ["none", "fora-2"]
    assert service.generate(ImageRequest("golden", labels=[1])).report["plan"] == "fora-2"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"model": "other"}, "there is no model 'other'; this service has golden"),
        ({"plan": "fora:3"}, "there is no plan 'fora:3'; this model has none, fora-2"),
        ({"labels": [10]}, "label 10"),
        ({"labels": None}, "labels are empty"),
        ({"labels": [1] * 17}, r"a request of this service has 1\.\.16 images, got 17"),
        ({"seed": -1}, "seed must be within"),
        ({"cfg_scale": [1.0, 2.0]}, "cfg_scale is a list of 2 for 1 images"),
        ({"cfg_channels": -1}, "cfg_channels must be"),
        ({"deadline": -1}, "deadline must be"),
        ({"cancel": 1}, "cancel must be"),
        ({"prompts": ["x" * 2001]}, "have up to 2001 characters, but this service takes 2000"),
        ({"prompts": "one"}, "prompts of a request must be a list of texts"),
        ({"prompts": [1]}, "prompts of a request must be a list of texts"),
        ({"prompts": ["one"]}, "no text encoder"),
    ],
)
def test_a_request_that_does_not_fit_is_refused(service: Service, more: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        service.generate(ImageRequest(**{"model": "golden", "labels": [1], **more}))


def test_a_deadline_ends_a_request_that_runs_and_one_that_waits(service: Service) -> None:
    hold = Hold()
    running = service.submit(ImageRequest("golden", labels=[1], deadline=1.5, callback=hold))
    assert hold.running.wait(60)
    waiting = service.submit(ImageRequest("golden", labels=[2], deadline=0.05))
    other = service.submit(ImageRequest("golden", labels=[3]))
    with pytest.raises(DeadlineError, match=r"within its deadline of 0\.05 s"):
        waiting.result(60)
    with pytest.raises(DeadlineError):
        running.result(60)
    hold.go.set()
    assert other.result(60).errors == {}
    assert hold.steps < 20, "nobody waited for the run, which should have ended"


def test_a_run_goes_on_until_nobody_waits_for_it(
    service: Service, alone: dict[str, Pipeline]
) -> None:
    hold, token = Hold(), CancelToken()
    kept = service.submit(ImageRequest("golden", labels=[1], seed=9))
    gone = service.submit(ImageRequest("golden", labels=[2], cancel=token, callback=hold))
    assert hold.running.wait(60)
    token.cancel()
    with pytest.raises(CancelledError):
        gone.result(60)
    hold.go.set()
    np.testing.assert_array_equal(
        kept.result(60).latents, alone["fora:2"].generate([1], seed=9).latents
    )


def test_asyncio_waits_and_cancels(service: Service) -> None:
    hold = Hold()

    async def run() -> int:
        task = asyncio.create_task(
            service.agenerate(ImageRequest("golden", labels=[1], callback=hold))
        )
        while not hold.running.is_set():
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        hold.go.set()
        return len((await service.agenerate(ImageRequest("golden", labels=[1, 2]))).latents)

    assert asyncio.run(run()) == 2
    assert hold.steps < 20


def test_a_full_queue_refuses_at_once_and_tells_when_to_come_back(golden_engine: Path) -> None:
    limits = ServiceLimits(queued_images=3, images_per_request=3)
    hold = Hold()
    with Service({"m": hosted(golden_engine, "fora:2")}, limits=limits) as service:
        running = service.submit(ImageRequest("m", labels=[0], callback=hold))
        assert hold.running.wait(60)
        waiting = [service.submit(ImageRequest("m", labels=[i])) for i in range(3)]
        with pytest.raises(OverloadedError, match="3 images wait already") as refused:
            service.submit(ImageRequest("m", labels=[4]))
        assert refused.value.retry_after >= 0.1
        assert (service.health().in_flight, service.health().queued) == (1, 3)
        waiting[0].cancel()  # which makes room
        waiting[0] = service.submit(ImageRequest("m", labels=[4]))
        hold.go.set()
        assert all(future.result(60).errors == {} for future in (running, *waiting))
        assert service.health().last_error is None


def test_draining_ends_what_was_accepted_and_refuses_the_rest(golden_engine: Path) -> None:
    service, hold = Service({"m": hosted(golden_engine, "fora:2")}, limits=SLOW), Hold()
    assert not service.ready()
    with pytest.raises(NotReadyError, match="it is new"):
        service.submit(ImageRequest("m", labels=[0]))
    service.start()
    assert service.ready()
    with pytest.raises(NotReadyError, match="starts once"):
        service.start()
    first = service.submit(ImageRequest("m", labels=[0], callback=hold))
    assert hold.running.wait(60)
    second = service.submit(ImageRequest("m", labels=[1]))
    assert not service.drain(0.05)
    assert not service.ready()
    with pytest.raises(NotReadyError, match="it is draining"):
        service.submit(ImageRequest("m", labels=[2]))
    hold.go.set()
    assert service.drain(60)
    assert (first.result(0).errors, second.result(0).errors) == ({}, {})
    service.close()
    service.close()
    assert service.health().state == "closed"


def test_closing_lets_runs_end_and_fails_those_that_wait(golden_engine: Path) -> None:
    service, hold = Service({"m": hosted(golden_engine, "fora:2")}), Hold()
    service.start()
    first = service.submit(ImageRequest("m", labels=[0], callback=hold))
    assert hold.running.wait(60)
    second = service.submit(ImageRequest("m", labels=[1]))
    threading.Timer(0.1, hold.go.set).start()
    service.close()
    assert first.result(0).errors == {}
    with pytest.raises(NotReadyError, match="closed"):
        second.result(0)


def test_a_service_that_cannot_load_is_not_ready_and_says_why(tmp_path: Path) -> None:
    service = Service({"m": tmp_path / "missing"})
    with pytest.raises(GocError, match="missing"):
        service.start()
    assert service.health().state == "failed"
    assert "missing" in (service.health().last_error or "")
    service.close()


def test_an_image_that_is_not_finite_is_an_error_of_its_request_only(
    service: Service, alone: dict[str, Pipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    request, bad_key = Drawing.request, (66, 1)

    def with_bad_noise(drawing: Drawing, part: range, *rest: object) -> object:
        made = request(drawing, part, *rest)
        for row, key in zip(made.noise, drawing.noise_keys[part.start : part.stop], strict=True):
            if key == bad_key:
                row[:] = 3e38
        return made

    monkeypatch.setattr(Drawing, "request", with_bad_noise)
    with np.errstate(all="ignore"):
        futures = [
            service.submit(ImageRequest("golden", labels=[1, 2, 3], seed=seed))
            for seed in (65, 66, 67)
        ]
        before, bad, after = (future.result(60) for future in futures)
    assert bad.report["batch_images"] == 9
    assert [(i, type(error)) for i, error in bad.errors.items()] == [(1, VerificationError)]
    assert (before.errors, after.errors) == ({}, {})
    expected = alone["fora:2"].generate([1, 2, 3], seed=67)
    np.testing.assert_array_equal(after.latents, expected.latents)


def test_a_run_that_fails_is_an_error_of_the_request_that_causes_it(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = Pipeline.draw

    def failing(pipe: Pipeline, drawing: Drawing, *rest: object, **more: object) -> Result:
        if 5 in drawing.conditions.labels:
            raise RuntimeError("label 5 breaks this engine")
        return draw(pipe, drawing, *rest, **more)

    monkeypatch.setattr(Pipeline, "draw", failing)
    futures = [service.submit(ImageRequest("golden", labels=[i])) for i in (4, 5, 6)]
    assert futures[0].result(60).errors == {}
    with pytest.raises(RuntimeError, match="label 5"):
        futures[1].result(60)
    assert futures[2].result(60).errors == {}
    assert service.health().last_error == "RuntimeError: label 5 breaks this engine"
    assert service.ready()


def test_callbacks_see_their_own_images_and_their_errors_are_isolated(
    service: Service, alone: dict[str, Pipeline]
) -> None:
    seen: list[tuple[int, int, int]] = []
    last: list[np.ndarray] = []

    def fail(_event: StepEvent) -> None:
        raise RuntimeError("from a user")

    def keep(event: StepEvent) -> None:
        seen.append((event.step, event.first_image, event.images))
        last.append(event.latents())

    futures: list[Future[Result]] = [
        service.submit(ImageRequest("golden", labels=[1, 2], seed=1, callback=fail)),
        service.submit(ImageRequest("golden", labels=[3, 4, 5], seed=2, callback=keep)),
    ]
    results = [future.result(60) for future in futures]
    assert results[1].report["batch_images"] == 5
    assert seen == [(step, 0, 3) for step in range(20)]
    np.testing.assert_array_equal(last[-1], results[1].latents)
    np.testing.assert_array_equal(
        results[0].latents, alone["fora:2"].generate([1, 2], seed=1).latents
    )


def test_the_log_has_fields_and_no_prompts(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "goc_deploy"):
        service.generate(ImageRequest("golden", labels=[1, 2], request_id="mine"))
        deadline = time.monotonic() + 10
        while not caplog.records and time.monotonic() < deadline:
            time.sleep(0.01)
    (record,) = [r for r in caplog.records if getattr(r, "request_id", "") == "mine"]
    assert (record.model, record.plan, record.outcome, record.images) == (
        "golden",
        "fora-2",
        "ok",
        2,
    )
    assert record.queue_seconds >= 0
    assert not hasattr(record, "prompts")


def test_the_same_files_have_the_same_fingerprint(service: Service, golden_engine: Path) -> None:
    health = service.health().as_dict()["models"]["golden"]
    with Service({"again": hosted(golden_engine, "none")}) as other:
        again = other.health().models["again"]
    assert again["fingerprint"] == health["fingerprint"]
    assert (again["plans"], health["backend"]) == (["none"], "onnxruntime")


@pytest.mark.parametrize(
    "limits",
    [{"workers": 0}, {"max_delay_seconds": -1}, {"batch_images": True}, {"queued_images": 15}],
)
def test_limits_that_make_no_sense_are_refused(limits: dict) -> None:
    with pytest.raises(UsageError):
        ServiceLimits(**limits)
