"""Calls at given times, for the deadlines of requests."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable
from threading import TIMEOUT_MAX


class Alarms:
    """One thread that calls functions when their time has come."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()  # so that functions are never compared
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="goc-deadlines", daemon=True)
        self._thread.start()

    def at(self, when: float, call: Callable[[], None]) -> Callable[[], None]:
        """Call a function at a time of `time.monotonic`; the returned function forgets it."""
        entry = (when, next(self._order), call)
        with self._changed:
            heapq.heappush(self._heap, entry)
            self._changed.notify()

        def forget() -> None:
            with self._changed:
                if entry in self._heap:
                    self._heap.remove(entry)
                    heapq.heapify(self._heap)

        return forget

    def runs_in(self, thread: threading.Thread) -> bool:
        """Whether functions are called in a thread."""
        return thread is self._thread

    def close(self) -> None:
        """End the thread; no function is called any more."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                if self._closed:
                    return
                left = self._heap[0][0] - time.monotonic() if self._heap else None
                if left is None or left > 0:
                    self._changed.wait(None if left is None else min(left, TIMEOUT_MAX))
                    continue
                call = heapq.heappop(self._heap)[2]
            call()
