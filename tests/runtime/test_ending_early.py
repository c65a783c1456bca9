"""Deadlines and cancelled tokens of `Pipeline.generate`."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest

import goc_deploy
from goc_deploy import CancelToken
from goc_deploy.api import cpu_backend
from goc_deploy.cancellation import CallLimits, call_limits
from goc_deploy.engines.ort_stream import OrtStream
from goc_deploy.errors import CancelledError, DeadlineError, EngineDirError
from goc_deploy.runtime.decoder import LatentDecoder
from goc_deploy.runtime.pipeline import Pipeline
from goc_deploy.runtime.step_events import StepEvent
from goc_deploy.runtime.weights import Weights
from goc_deploy.spec import DecoderSpec, ModelSpec
from goc_deploy.trace import Span
from tests.stand_ins.silent import SilentEngine

LABELS = [1, 7]


@pytest.fixture(scope="module")
def pipe(golden_engine: Path) -> Pipeline:
    return goc_deploy.load(
        golden_engine, plan="fora:2+gc:1.2", backend="onnxruntime", max_sessions=2
    )


@pytest.fixture(scope="module")
def expected(pipe: Pipeline) -> np.ndarray:
    return pipe.generate(LABELS, seed=3).latents


class CancelledAtCheck(CancelToken):
    """A token that is cancelled when it is looked at for the n-th time."""

    def __init__(self, check: int) -> None:
        super().__init__()
        self.checks, self._last = 0, check

    @property
    def cancelled(self) -> bool:
        self.checks += 1
        return self.checks >= self._last


def test_limits_that_nothing_reaches_change_nothing(pipe: Pipeline, expected: np.ndarray) -> None:
    found = pipe.generate(LABELS, seed=3, deadline=1000, cancel=CancelToken())
    np.testing.assert_array_equal(found.latents, expected)


@pytest.mark.parametrize("spans", [None, []])
def test_a_token_is_checked_before_every_launch(
    pipe: Pipeline, expected: np.ndarray, spans: list[Span] | None
) -> None:
    counting = CancelledAtCheck(10**9)
    pipe.generate(LABELS, seed=3, cancel=counting, spans=spans)
    launches: list[Span] = []
    pipe.generate(LABELS, seed=3, spans=launches)
    count = sum(span.category == "launch" for span in launches)
    assert counting.checks >= count > 150
    for check in (1, 2, count // 2, count):
        with pytest.raises(CancelledError):
            pipe.generate(LABELS, seed=3, cancel=CancelledAtCheck(check), spans=spans)
        np.testing.assert_array_equal(pipe.generate(LABELS, seed=3).latents, expected)


def test_a_deadline_ends_a_run_and_the_session_is_usable_at_once(
    pipe: Pipeline, expected: np.ndarray
) -> None:
    def slow(_event: StepEvent) -> None:
        time.sleep(0.02)

    with pytest.raises(DeadlineError, match=r"within its deadline of 0\.1 s"):
        pipe.generate(LABELS, seed=3, deadline=0.1, callback=slow)
    with pytest.raises(DeadlineError):
        pipe.generate(LABELS, deadline=0)
    np.testing.assert_array_equal(pipe.generate(LABELS, seed=3).latents, expected)


def test_a_token_that_is_cancelled_before_or_after_ends_only_what_starts_later(
    pipe: Pipeline, expected: np.ndarray
) -> None:
    token = CancelToken()
    np.testing.assert_array_equal(pipe.generate(LABELS, seed=3, cancel=token).latents, expected)
    token.cancel()
    np.testing.assert_array_equal(pipe.generate(LABELS, seed=3).latents, expected)
    with pytest.raises(CancelledError):
        pipe.generate(LABELS, seed=3, cancel=token)


def test_cancelling_some_calls_changes_nothing_in_those_that_run_beside_them(
    pipe: Pipeline, expected: np.ndarray
) -> None:
    found: list[np.ndarray] = []
    ended: list[type[Exception]] = []

    def keep() -> None:
        found.extend(pipe.generate(LABELS, seed=3).latents for _ in range(6))

    def cancel(after: float) -> None:
        for _ in range(6):
            token = CancelToken()
            timer = threading.Timer(after, token.cancel)
            timer.start()
            try:
                pipe.generate(LABELS, seed=4, cancel=token)
            except CancelledError as error:
                ended.append(type(error))
            timer.join()

    threads = [
        threading.Thread(target=keep),
        threading.Thread(target=keep),
        *(threading.Thread(target=cancel, args=(0.001 * i,)) for i in range(1, 5)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert ended, "no call was cancelled while it ran or waited"
    assert len(found) == 12
    for latents in found:
        np.testing.assert_array_equal(latents, expected)


@pytest.mark.parametrize("how", ["deadline", "cancel"])
def test_a_call_that_waits_for_a_session_ends_early_too(golden_engine: Path, how: str) -> None:
    loaded = goc_deploy.load(golden_engine, backend="onnxruntime")
    running, go_on = threading.Event(), threading.Event()

    def hold(_event: StepEvent) -> None:
        running.set()
        go_on.wait(60)

    first = threading.Thread(target=lambda: loaded.generate([0], callback=hold))
    first.start()
    running.wait(60)
    token = CancelToken()
    threading.Timer(0.1, token.cancel).start()
    error, limits = (
        (DeadlineError, {"deadline": 0.1}) if how == "deadline" else (CancelledError, {})
    )
    started = time.monotonic()
    with pytest.raises(error):
        loaded.generate([1], **(limits or {"cancel": token}))
    assert time.monotonic() - started < 5
    go_on.set()
    first.join(60)
    assert loaded.generate([1]).latents.shape[0] == 1


def test_a_call_that_waits_for_an_exchange_of_weights_ends_early_too() -> None:
    weights, waits, go_on = Weights(), threading.Event(), threading.Event()

    def exchange() -> None:
        with weights.exchange(), weights.alone():
            waits.set()
            go_on.wait(60)

    thread = threading.Thread(target=exchange)
    thread.start()
    assert waits.wait(60)
    with pytest.raises(DeadlineError), weights.running(call_limits(0.05, None)):
        pass
    go_on.set()
    thread.join(60)
    with weights.running(CallLimits()):
        pass


def test_a_launch_that_runs_is_interrupted_and_the_next_call_is_not(
    pipe: Pipeline, expected: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    token, interrupt = CancelToken(), OrtStream.interrupt
    interrupted = []

    def counted(stream: OrtStream) -> None:
        interrupted.append(stream)
        interrupt(stream)

    def never(_limits: CallLimits) -> None:
        """Without checks between launches, only an interrupted launch can end the call."""

    monkeypatch.setattr(OrtStream, "interrupt", counted)
    with monkeypatch.context() as patched:
        patched.setattr(CallLimits, "check", never)
        with pytest.raises(EngineDirError, match=r"[Tt]erminat"):
            pipe.generate(LABELS, seed=3, cancel=token, callback=lambda _: token.cancel())
    assert len(interrupted) == 1
    np.testing.assert_array_equal(pipe.generate(LABELS, seed=3).latents, expected)


def test_no_tile_is_decoded_after_the_end() -> None:
    backend = cpu_backend()
    engine = SilentEngine(backend)
    spec = ModelSpec(2, 8, 2, 16, 2, 2, 4, 10, False)
    decoder = LatentDecoder(engine, backend, DecoderSpec(3, 2, 8, 2), spec)  # type: ignore[arg-type]
    latents = np.zeros((1, 4, 8, 8), np.float32)
    decoder.images(latents)
    assert engine.runs == 1
    with pytest.raises(DeadlineError):
        decoder.images(latents, call_limits(0, None))
    assert engine.runs == 1
