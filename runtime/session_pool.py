"""Sessions that callers use in turn; no interrupt can lose a session.

Ctrl-C may arrive at any call, also inside a ``finally``. A queue from which a session was popped,
or a semaphore that was decremented, would then lack a session permanently. Here nothing is popped
or counted. A session belongs to the claim that its slot refers to. A claim refers to its slot
before the slot refers to it, and the end of a call releases the slot by one assignment, before any
operation that can be interrupted.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from goc_deploy.cancellation import POLL_SECONDS, CallLimits
from goc_deploy.errors import EnvironmentUnsupportedError, UsageError
from goc_deploy.runtime.interpreter_exit import native_calls
from goc_deploy.runtime.session import Session
from goc_deploy.trace import Span, recorded

CLOSED = "the pipeline is closed; load the engine directory again"

Returned = TypeVar("Returned")


@dataclass(slots=True, eq=False)
class _Claim:
    """A call that waits for a session, or uses the session of its slot."""

    thread: int
    slot: _Slot | None = None


@dataclass(slots=True, eq=False)
class _Slot:
    """A place for a session, which is made when it is first needed; free if it has no claim."""

    session: Session | None = None
    claim: _Claim | None = None


class SessionPool:
    """At most ``size`` callers run at a time, others wait.

    Args:
        size: number of sessions.

    Attributes:
        closed: whether `close` was called.
        bell: rings that wake waiting callers.
    """

    def __init__(self, size: int) -> None:
        self._slots = tuple(_Slot() for _ in range(size))
        self._choosing = threading.Lock()
        # Wakes a waiting caller, which then searches for a free slot. A superfluous ring is
        # harmless, and every call that ends or takes a slot rings, so no ring is missing. The queue
        # is written in C, and an interrupted wait removes nothing.
        self.bell: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.closed = False

    @property
    def free(self) -> int:
        """Number of slots without a claim."""
        return sum(slot.claim is None for slot in self._slots)

    def run(
        self,
        make: Callable[[], Session],
        work: Callable[[Session], Returned],
        spans: list[Span] | None = None,
        limits: CallLimits | None = None,
    ) -> Returned:
        """Wait for a session, and call ``work`` with exclusive use of it.

        Args:
            make: makes a session.
            work: the function to call with the session.
            spans: list to which the waiting time is appended.
            limits: what may end the wait early.

        Raises:
            EnvironmentUnsupportedError: the pool is closed.
            CancelledError, DeadlineError: because of ``limits``.
            UsageError: all sessions are in use, and this thread would wait for itself.
        """
        return self._run(self._slots, make, work, spans, limits)

    def run_on_each(self, make: Callable[[], Session], work: Callable[[Session], Returned]) -> None:
        """Call ``work`` with every session, one after the other; see `run`."""
        for slot in self._slots:
            self._run((slot,), make, work, None)

    def _run(
        self,
        slots: Sequence[_Slot],
        make: Callable[[], Session],
        work: Callable[[Session], Returned],
        spans: list[Span] | None,
        limits: CallLimits | None = None,
    ) -> Returned:
        claim = _Claim(threading.get_ident())
        try:
            with recorded(spans, "wait", "wait for a session"):
                slot = self._take(claim, slots, limits)
            if slot.session is None:
                slot.session = make()
            if self.closed:
                raise EnvironmentUnsupportedError(CLOSED)
            with native_calls():
                return work(slot.session)
        finally:
            own_slot = claim.slot
            if own_slot is not None and own_slot.claim is claim:
                own_slot.claim = None
                if self.closed:
                    own_slot.session = None
            self.bell.put(None)

    def close(self) -> None:
        """Drop free sessions, and the others when their calls end; wake waiting callers."""
        self.closed = True
        for slot in self._slots:
            if slot.claim is None:
                slot.session = None
        self.bell.put(None)

    def _take(self, claim: _Claim, slots: Sequence[_Slot], limits: CallLimits | None) -> _Slot:
        while True:
            if self.closed:
                raise EnvironmentUnsupportedError(CLOSED)
            with self._choosing:
                for slot in slots:
                    if slot.claim is None:
                        claim.slot = slot
                        slot.claim = claim
                        break
            if claim.slot is not None:
                self._forget_rings()
                self.bell.put(None)  # for the next waiting caller: another slot may be free too
                return claim.slot
            if any(slot.claim is not None and slot.claim.thread == claim.thread for slot in slots):
                raise UsageError(
                    f"all {len(self._slots)} sessions of the pipeline are taken, one of them by "
                    "this thread, which would wait for itself; "
                    "do not generate from a callback, or load with a larger max_sessions"
                )
            if limits is None:
                self.bell.get()
            else:
                limits.check()
                with contextlib.suppress(queue.Empty):
                    self.bell.get(timeout=POLL_SECONDS)

    def _forget_rings(self) -> None:
        try:
            while True:
                self.bell.get_nowait()
        except queue.Empty:
            pass
