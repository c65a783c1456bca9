"""What must not stop a service or keep memory: odd deadlines, handlers, callbacks, locks."""

from __future__ import annotations

import gc
import logging
import math
import pickle
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import goc_deploy
from goc_deploy.cancellation import CancelToken
from goc_deploy.disk import directory_lock
from goc_deploy.errors import CancelledError, DeadlineError, UsageError
from goc_deploy.runtime.pipeline import Pipeline
from goc_deploy.runtime.step_events import StepEvent
from goc_deploy.serving import HostedModel, ImageRequest, Service, ServiceLimits
from tests.manifest_reads import count_reads

PLANS = ("none", "fora:2", "fora:2+gc:1.2")


def hosted(engine: Path) -> HostedModel:
    return HostedModel(engine, PLANS, backend="onnxruntime")


@pytest.fixture(scope="module")
def service(golden_engine: Path) -> Iterator[Service]:
    limits = ServiceLimits(max_delay_seconds=0.2)
    with Service({"golden": hosted(golden_engine)}, limits=limits) as started:
        yield started


def test_many_threads_of_several_plans_get_what_each_gets_alone(
    service: Service, golden_engine: Path
) -> None:
    requests = [
        ImageRequest("golden", PLANS[i % 3], labels=[i % 10], seed=i, cfg_scale=1 + i % 4)
        for i in range(96)
    ]
    with ThreadPoolExecutor(32) as pool:
        found = list(pool.map(service.generate, requests))
    pipes = goc_deploy.load_plans(golden_engine, PLANS, backend="onnxruntime")
    for request, result in zip(requests, found, strict=True):
        alone = pipes[PLANS.index(str(request.plan))].generate(
            request.labels, seed=request.seed, cfg_scale=request.cfg_scale
        )
        np.testing.assert_array_equal(result.latents, alone.latents)
    for pipe in pipes:
        pipe.close()


def test_a_result_that_nobody_needs_is_freed_at_once(service: Service) -> None:
    gc.collect()
    gc.disable()
    try:
        token = CancelToken()
        future = service.submit(
            ImageRequest("golden", labels=[1], cancel=token, callback=lambda _: None)
        )
        kept = weakref.ref(future.result(60).latents)
        del future
        deadline = time.monotonic() + 10
        while kept() is not None and time.monotonic() < deadline:
            time.sleep(0.01)  # until the worker has forgotten the batch
        assert kept() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("name", ["close", "drain"])
@pytest.mark.parametrize("where", ["step", "result", "deadline"])
def test_ending_a_service_in_its_own_thread_is_refused(
    golden_engine: Path, name: str, where: str
) -> None:
    found: list[str] = []
    go = threading.Event()

    def end(_: object) -> None:
        try:
            getattr(service, name)()
        except UsageError as error:
            found.append(str(error))

    def hold(_event: StepEvent) -> None:
        go.wait(60)

    with Service({"golden": hosted(golden_engine)}) as service:
        future = service.submit(
            ImageRequest(
                "golden",
                labels=[1],
                callback=end if where == "step" else hold,
                deadline=0.1 if where == "deadline" else None,
            )
        )
        other = service.submit(ImageRequest("golden", labels=[2]))
        if where != "step":
            future.add_done_callback(end)
        if where != "deadline":
            go.set()
        assert (future.exception(60) is None) == (where != "deadline")
        go.set()
        assert other.result(60).errors == {}
    assert f"{name}() was called in a thread of the service" in found[0]


@pytest.mark.parametrize("deadline", [math.inf, 1e300, 1e10])
def test_a_deadline_that_no_clock_can_hold_leaves_the_others_working(
    service: Service, deadline: float
) -> None:
    first = service.submit(ImageRequest("golden", labels=[1], deadline=deadline))
    assert first.result(60).errors == {}
    hold = threading.Event()

    def wait(_event: StepEvent) -> None:
        hold.wait(60)

    late = service.submit(ImageRequest("golden", labels=[1], deadline=0.3, callback=wait))
    with pytest.raises(DeadlineError):
        late.result(60)
    hold.set()


def test_a_service_may_wait_for_full_batches_without_end(golden_engine: Path) -> None:
    limits = ServiceLimits(max_delay_seconds=math.inf, batch_images=2)
    with Service({"golden": hosted(golden_engine)}, limits=limits) as service:
        futures = [service.submit(ImageRequest("golden", labels=[i])) for i in range(3)]
        assert [futures[i].result(60).report["batch_images"] for i in range(2)] == [2, 2]
        assert not futures[2].done()
        assert service.drain(60)
        assert futures[2].result(0).report["batch_images"] == 1


def test_a_handler_of_the_log_that_raises_keeps_no_request(golden_engine: Path) -> None:
    class Broken(logging.Handler):
        def emit(self, _record: logging.LogRecord) -> None:
            raise OSError("the disk is full")

    log, broken = logging.getLogger("goc_deploy.serving.reports"), Broken()
    with Service({"golden": hosted(golden_engine)}) as service:
        log.addHandler(broken)
        level = log.level
        log.setLevel(logging.INFO)
        try:
            assert service.generate(ImageRequest("golden", labels=[1])).errors == {}
            assert service.drain(10), "the request that ended still counts as accepted"
        finally:
            log.setLevel(level)
            log.removeHandler(broken)


def test_a_callback_that_ends_its_thread_ends_its_own_request_only(service: Service) -> None:
    def leave(_event: StepEvent) -> None:
        raise SystemExit(3)

    gone = service.submit(ImageRequest("golden", labels=[1], callback=leave))
    other = service.submit(ImageRequest("golden", labels=[2]))
    assert other.result(60).report["batch_images"] == 2
    with pytest.raises(SystemExit):
        gone.result(60)
    assert service.generate(ImageRequest("golden", labels=[3])).errors == {}


def test_a_token_that_was_cancelled_before_or_after_ends_only_what_starts_later(
    service: Service,
) -> None:
    token = CancelToken()
    request = ImageRequest("golden", labels=[1], cancel=token)
    assert service.generate(request).errors == {}
    token.cancel()
    with pytest.raises(CancelledError):
        service.generate(request)
    assert service.generate(ImageRequest("golden", labels=[1])).errors == {}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"labels": []}, "labels are empty"),
        ({"labels": [-1]}, "label -1"),
        ({"labels": [1.5]}, r"label 1\.5"),
        ({"labels": 1}, "labels are a list"),
        ({"seed": 2**64}, "seed must be within"),
        ({"seed": 1.5}, "seed must be a whole number"),
        ({"seed": [1, 2]}, "seed is a list of 2 for 1 images"),
        ({"cfg_scale": math.nan}, "cfg_scale must be"),
        ({"cfg_scale": math.inf}, "cfg_scale must be"),
        ({"deadline": math.nan}, "deadline must be"),
        ({"plan": "fora:2@T7"}, "there is no plan"),
    ],
)
def test_odd_numbers_are_refused(service: Service, more: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        service.submit(ImageRequest(**{"model": "golden", "labels": [1], **more}))


def test_services_share_a_directory_that_a_writer_has_locked(golden_engine: Path) -> None:
    request = ImageRequest("golden", labels=[1], seed=4)
    with (
        directory_lock(golden_engine),
        Service({"golden": hosted(golden_engine)}) as one,
        Service({"golden": hosted(golden_engine)}) as two,
    ):
        np.testing.assert_array_equal(one.generate(request).latents, two.generate(request).latents)


def test_a_service_reads_each_manifest_once(
    golden_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = count_reads(monkeypatch)
    with Service({"golden": hosted(golden_engine)}):
        assert len(opened) == 1


def test_a_service_cannot_be_pickled(service: Service) -> None:
    with pytest.raises(TypeError, match="start one in the other process"):
        pickle.dumps(service)


def test_a_service_is_ready_only_when_its_plans_are_warm(
    golden_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warmup, seen = Pipeline.warmup, list[tuple[bool, str]]()

    def watched(pipe: Pipeline, *rest: Any) -> None:
        seen.append((service.ready(), service.health().state))
        warmup(pipe, *rest)

    monkeypatch.setattr(Pipeline, "warmup", watched)
    plans = ("none", "fora:2")
    service = Service({"m": HostedModel(golden_engine, plans, backend="onnxruntime")})
    with service:
        assert seen == [(False, "loading")] * 2
        assert service.ready()
