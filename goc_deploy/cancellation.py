"""Ending a call early: a token that another thread cancels, and a deadline."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from goc_deploy.errors import CancelledError, DeadlineError, UsageError

POLL_SECONDS = 0.02  # between two checks of a call that waits

Check = Callable[[], None]


class CancelToken:
    """Cancels the calls that it was passed to. Thread-safe.

    Args:
        parents: tokens that cancel this one too, but are not cancelled by it.
    """

    def __init__(self, *parents: CancelToken) -> None:
        self._parents = parents
        self._cancelled = False
        # Reentrant, because a signal handler may cancel while its thread holds the lock.
        self._lock = threading.RLock()
        self._reactions: list[Callable[[], None]] = []

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called on this token or on a parent."""
        return self._cancelled or any(parent.cancelled for parent in self._parents)

    def cancel(self) -> None:
        """Cancel the calls of this token, from any thread. Calls that ended are not affected."""
        with self._lock:
            self._cancelled = True
            reactions, self._reactions = self._reactions, []
            for react in reactions:
                react()

    @contextmanager
    def calling(self, react: Callable[[], None]) -> Iterator[None]:
        """Call a function when the token is cancelled while the block runs.

        Args:
            react: called at most once per token, in the thread that cancels, and immediately if the
                token was cancelled before. It is not running when the block has ended.
        """
        with ExitStack() as stack:
            for parent in self._parents:
                stack.enter_context(parent.calling(react))
            stack.enter_context(self._calling(react))
            yield

    @contextmanager
    def _calling(self, react: Callable[[], None]) -> Iterator[None]:
        with self._lock:
            if self._cancelled:
                react()
            else:
                self._reactions.append(react)
        try:
            yield
        finally:
            with self._lock:
                if react in self._reactions:
                    self._reactions.remove(react)


@dataclass(frozen=True, slots=True)
class CallLimits:
    """What may end a call early.

    Attributes:
        token: the token of the call, or None.
        seconds: time that the call may take, or None.
        ends_at: the end of that time on the clock of `time.monotonic`; infinite without a deadline.
    """

    token: CancelToken | None = None
    seconds: float | None = None
    ends_at: float = math.inf

    def check(self) -> None:
        """Raise an error if the call must end.

        Raises:
            CancelledError: the token was cancelled.
            DeadlineError: the time is over.
        """
        if self.token is not None and self.token.cancelled:
            raise CancelledError("the call was cancelled through its token")
        if time.monotonic() >= self.ends_at:
            raise DeadlineError(
                f"the call did not end within its deadline of {self.seconds:g} s; give it more "
                "time, fewer images, or a plan with fewer computed units"
            )

    @property
    def remaining(self) -> float | None:
        """Seconds until the deadline, not negative; None without a deadline."""
        if self.seconds is None:
            return None
        return max(0.0, self.ends_at - time.monotonic())


def call_limits(deadline: Any, cancel: Any) -> CallLimits | None:
    """The limits of a call that starts now, or None if it has none.

    Args:
        deadline: seconds, or None.
        cancel: a `CancelToken`, or None.

    Raises:
        UsageError: the deadline is not a number of seconds, or the token is another object.
    """
    if deadline is None and cancel is None:
        return None
    if cancel is not None and not isinstance(cancel, CancelToken):
        raise UsageError(f"cancel must be a goc_deploy.CancelToken, got {cancel!r:.60}")
    if deadline is None:
        return CallLimits(cancel)
    number = isinstance(deadline, (int, float)) and not isinstance(deadline, bool)
    if not number or not deadline >= 0:
        raise UsageError(
            f"deadline must be a number of seconds and not negative, got {deadline!r:.60}"
        )
    return CallLimits(cancel, float(deadline), time.monotonic() + float(deadline))
