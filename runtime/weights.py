"""The weights of loaded engines: their source, and the requests that use them."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING
from weakref import WeakSet

from goc_deploy.cancellation import POLL_SECONDS, CallLimits
from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.errors import EnvironmentUnsupportedError, UsageError
from goc_deploy.protocols import NOTHING

if TYPE_CHECKING:
    from goc_deploy.runtime.session import Session


class Weights:
    """The weights that all pipelines on the same engines share.

    Either any number of requests use them, or one thread exchanges them.

    Attributes:
        directory: the engine directory of the engines, or None.
        content: graphs of that directory and the current weights, mapped, by path in that
            directory.
        checkpoint_sha256: digest of the checkpoint from which the current weights were exported.
        sessions: sessions that may have bound engines.
        lost: the reason why the engines cannot be used any more, or None.
    """

    def __init__(
        self, directory: EngineDir | None = None, content: Mapping[str, memoryview] = NOTHING
    ) -> None:
        self.directory, self.content = directory, dict(content)
        self.checkpoint_sha256 = (
            None if directory is None else directory.manifest.provenance.get("checkpoint_sha256")
        )
        self.sessions: WeakSet[Session] = WeakSet()
        self.lost: str | None = None
        self._one_exchange, self._changed = threading.Lock(), threading.Condition()
        self._running: Counter[int] = (
            Counter()
        )  # per thread, because requests of a thread may be nested
        self._exchanging = False

    @contextmanager
    def running(self, limits: CallLimits | None = None) -> Iterator[None]:
        """Use the engines in the body, after a running exchange; the next exchange waits for it.

        Args:
            limits: what may end the wait early.

        Raises:
            EnvironmentUnsupportedError: an exchange lost the weights.
            CancelledError, DeadlineError: because of ``limits``.
        """
        me, interval = threading.get_ident(), None if limits is None else POLL_SECONDS
        with self._changed:
            while not self._changed.wait_for(
                lambda: me in self._running or not self._exchanging, interval
            ):
                if limits is not None:
                    limits.check()
            if self.lost is not None:
                raise EnvironmentUnsupportedError(self.lost)
            self._running[me] += 1
        try:
            yield
        finally:
            with self._changed:
                self._running[me] -= 1
                if not self._running[me]:
                    del self._running[me]
                self._changed.notify_all()

    @contextmanager
    def exchange(self) -> Iterator[None]:
        """Prepare an exchange in the body, one thread at a time; requests continue to run.

        Raises:
            UsageError: the caller is a callback of a request, which would wait for itself.
            EnvironmentUnsupportedError: an exchange lost the weights.
        """
        with self._changed:
            if threading.get_ident() in self._running:
                raise UsageError(
                    "weights cannot be loaded by a callback of a request that runs on them; load "
                    "them afterwards"
                )
        with self._one_exchange:
            if self.lost is not None:
                raise EnvironmentUnsupportedError(self.lost)
            yield

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Within `exchange`, wait for running requests; later requests wait for the body."""
        try:
            with self._changed:
                self._exchanging = True
                self._changed.wait_for(lambda: not self._running)
            yield
        finally:
            with self._changed:
                self._exchanging = False
                self._changed.notify_all()
