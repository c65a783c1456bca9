from __future__ import annotations

import gc
import itertools
import sys
import threading
import time
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from goc_deploy.errors import EnvironmentUnsupportedError, ResourceError, UsageError
from goc_deploy.runtime.session_pool import SessionPool
from goc_deploy.trace import Span


class Nothing:
    """A session, as far as a pool looks at it."""


def works_for_another_thread(pool: SessionPool) -> bool:
    done = threading.Event()
    thread = threading.Thread(target=lambda: pool.run(Nothing, lambda _: done.set()), daemon=True)
    thread.start()
    return done.wait(20)


def interrupt_at(event: int) -> None:
    """Raise KeyboardInterrupt at the places at which Python looks for signals.

    They are the beginning of a function and the return of a call of C.
    """
    seen = itertools.count()

    def profile(_frame: FrameType, kind: str, _argument: Any) -> None:
        if kind in ("call", "c_return") and next(seen) == event:
            sys.setprofile(None)
            raise KeyboardInterrupt

    sys.setprofile(profile)


@pytest.mark.parametrize("spans", [None, []])
def test_an_interrupt_at_any_moment_loses_no_session(spans: list[Span] | None) -> None:
    pool = SessionPool(1)
    for event in itertools.count():
        kept = None
        try:
            interrupt_at(event)
            pool.run(Nothing, lambda _: None, spans)
        except KeyboardInterrupt as interrupt:
            kept = interrupt  # and with it every frame, as in an interactive interpreter
        sys.setprofile(None)
        assert pool.free == 1, f"lost at event {event}"
        assert works_for_another_thread(pool), f"nobody is woken after event {event}"
        if kept is None:
            break
    assert event > 10


def test_whoever_waits_is_woken_wherever_the_one_before_is_interrupted() -> None:
    for event in itertools.count():
        pool, answers, interrupted = SessionPool(1), [], False
        waits = threading.Thread(
            target=lambda p=pool, a=answers: p.run(Nothing, lambda _: a.append(1)), daemon=True
        )

        def work(_: object, event: int = event, waits: threading.Thread = waits) -> None:
            waits.start()
            time.sleep(0.02)
            interrupt_at(event)

        try:
            pool.run(Nothing, work)
        except KeyboardInterrupt:
            interrupted = True
        sys.setprofile(None)
        waits.join(20)
        assert answers == [1], f"the one that waits sleeps for ever after event {event}"
        if not interrupted:
            break


def test_no_more_callers_than_sessions_run_and_all_are_served() -> None:
    pool, running, most, made = SessionPool(3), [], [], []

    def work(_: object) -> None:
        running.append(1)
        most.append(len(running))
        time.sleep(0.001)
        running.pop()

    def call() -> None:
        for _ in range(50):
            pool.run(lambda: made.append(1) or Nothing(), work)  # type: ignore[func-returns-value]

    threads = [threading.Thread(target=call) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(most) == 600
    assert 2 <= max(most) <= 3
    assert len(made) <= 3
    assert pool.bell.qsize() < 50


@pytest.mark.parametrize("where", ["make", "work", "spans"])
def test_an_exception_leaves_the_session_to_the_next(where: str) -> None:
    pool = SessionPool(1)

    def fail(*_: object) -> Any:
        raise ResourceError("no memory")

    class Spans(list[Span]):
        append = fail

    make: Callable[[], Any] = fail if where == "make" else Nothing
    with pytest.raises(ResourceError):
        pool.run(
            make, fail if where == "work" else lambda _: None, Spans() if where == "spans" else None
        )
    assert works_for_another_thread(pool)


def test_a_thread_that_would_wait_for_itself_is_told() -> None:
    pool = SessionPool(2)
    with pytest.raises(
        UsageError,
        match=r"all 2 sessions .* would wait for itself; do not generate from a callback",
    ):
        pool.run(Nothing, lambda _: pool.run(Nothing, lambda _: pool.run(Nothing, lambda _: None)))
    assert pool.free == 2


def test_closing_wakes_all_who_wait_and_drops_every_session() -> None:
    pool, go_on, errors = SessionPool(1), threading.Event(), []

    def wait() -> None:
        try:
            pool.run(Nothing, lambda _: None)
        except EnvironmentUnsupportedError as error:
            errors.append(str(error))

    sessions: list[weakref.ref[object]] = []

    def make() -> Any:
        session = Nothing()
        sessions.append(weakref.ref(session))
        return session

    first = threading.Thread(target=lambda: pool.run(make, lambda _: go_on.wait(20)))
    first.start()
    while pool.free:
        time.sleep(0.001)
    others = [threading.Thread(target=wait) for _ in range(5)]
    for thread in others:
        thread.start()
    time.sleep(0.05)
    pool.close()
    for thread in others:
        thread.join(20)
    assert len(errors) == 5
    go_on.set()
    first.join(20)
    gc.collect()
    assert len(sessions) == 1
    assert sessions[0]() is None
