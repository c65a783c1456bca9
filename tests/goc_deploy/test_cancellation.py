from __future__ import annotations

import signal
import threading

import pytest

from goc_deploy.cancellation import CallLimits, CancelToken, call_limits
from goc_deploy.errors import CancelledError, DeadlineError, UsageError


def test_a_call_without_limits_has_nothing_to_check() -> None:
    assert call_limits(None, None) is None


def test_a_cancelled_token_ends_the_call() -> None:
    token = CancelToken()
    limits = call_limits(None, token)
    assert limits is not None
    limits.check()
    assert not token.cancelled
    token.cancel()
    token.cancel()
    assert token.cancelled
    with pytest.raises(CancelledError, match="cancelled through its token"):
        limits.check()


def test_a_deadline_ends_the_call_and_the_message_has_its_seconds() -> None:
    limits = call_limits(0, None)
    assert limits is not None
    assert limits.remaining == 0
    with pytest.raises(DeadlineError, match="within its deadline of 0 s"):
        limits.check()
    later = call_limits(1000, None)
    assert later is not None
    later.check()
    assert 999 < (later.remaining or 0) <= 1000
    assert CallLimits(CancelToken()).remaining is None


@pytest.mark.parametrize("deadline", [-1, float("nan"), "1", True, [1]])
def test_a_deadline_that_is_no_number_of_seconds_is_refused(deadline: object) -> None:
    with pytest.raises(UsageError, match="deadline must be a number of seconds"):
        call_limits(deadline, None)


def test_another_object_than_a_token_is_refused() -> None:
    with pytest.raises(UsageError, match=r"cancel must be a goc_deploy.CancelToken, got <"):
        call_limits(None, threading.Event())


def test_a_child_is_cancelled_with_its_parent_and_not_the_other_way_round() -> None:
    parent = CancelToken()
    first, second, seen = CancelToken(parent), CancelToken(parent), []
    first.cancel()
    assert (parent.cancelled, second.cancelled) == (False, False)
    with second.calling(lambda: seen.append("second")):
        parent.cancel()
    assert second.cancelled
    assert seen == ["second"]


def test_a_reaction_comes_while_the_block_runs_and_not_afterwards() -> None:
    token, seen = CancelToken(), []
    with token.calling(lambda: seen.append("ended block")):
        pass
    with token.calling(lambda: seen.append("running block")):
        token.cancel()
    with token.calling(lambda: seen.append("cancelled before")):
        pass
    assert seen == ["running block", "cancelled before"]


def test_a_signal_handler_may_cancel_while_its_thread_registers() -> None:
    token, seen = CancelToken(), []
    token.cancel()

    def handler(*_: object) -> None:
        token.cancel()
        seen.append("handled")

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        with token.calling(lambda: signal.raise_signal(signal.SIGUSR1)):
            seen.append("registered")
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert seen == ["handled", "registered"]
