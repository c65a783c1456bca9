"""The object that a host embeds: several engine directories, one queue, dynamic batching."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import CancelledError as FutureCancelledError
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from goc_deploy.errors import (
    CancelledError,
    DeadlineError,
    EnvironmentUnsupportedError,
    GocError,
    NotReadyError,
    OverloadedError,
    UsageError,
)
from goc_deploy.runtime.results import Result
from goc_deploy.serving.admission import admitted
from goc_deploy.serving.alarms import Alarms
from goc_deploy.serving.batches import BatchRunner
from goc_deploy.serving.health import Health, State
from goc_deploy.serving.hosted import LoadedModel, loaded_model
from goc_deploy.serving.metrics import Metrics, NoMetrics
from goc_deploy.serving.queue import CLOSED, BatchQueue, Ticket
from goc_deploy.serving.reports import Reports
from goc_deploy.serving.requests import HostedModel, ImageRequest, ServiceLimits

logger = logging.getLogger(__name__)

NO_METRICS = NoMetrics()
EXPECTED = (CancelledError, DeadlineError, NotReadyError, OverloadedError, UsageError)
OWN_THREAD = (
    "{name}() was called in a thread of the service, by a callback or a metrics adapter, and would "
    "wait for that thread; call it in another thread"
)
FORKED = "the service was started before a fork, which its threads do not survive; start it after"


class Service:
    """Loads engine directories once, and draws the requests of any number of threads.

    Compatible requests (same model and plan, with or without guidance) that wait at the same time
    run together. The images of a request do not depend on the requests that it runs with.

    Args:
        models: engine directories by the name that requests use.
        limits: bounds of the queue, of batches and of requests.
        metrics: adapter of a metrics library.
        log_prompts: whether the log has the prompts of requests.
    """

    def __init__(
        self,
        models: Mapping[str, HostedModel | str | Path],
        *,
        limits: ServiceLimits | None = None,
        metrics: Metrics = NO_METRICS,
        log_prompts: bool = False,
    ) -> None:
        if not models:
            raise UsageError("a service needs at least one model")
        self.limits = ServiceLimits() if limits is None else limits
        self._wanted = {
            name: model if isinstance(model, HostedModel) else HostedModel(model)
            for name, model in models.items()
        }
        self._reports = Reports(metrics, log_prompts=log_prompts)
        self._state: State = "new"
        self._pid = os.getpid()
        self._changed = threading.Condition()
        self._reporting = threading.RLock()
        self._tickets: dict[Future[Result], Ticket] = {}
        self._last_error: str | None = None
        self._models: dict[str, LoadedModel] = {}
        self._queue = BatchQueue(self.limits.queued_images, self.limits.max_delay_seconds)
        self._runner = BatchRunner(self._reports, log_prompts=log_prompts)
        self._workers: list[threading.Thread] = []
        self._alarms: Alarms | None = None

    def start(self) -> None:
        """Load all models, warm them up, and accept requests from then on.

        Raises:
            GocError: a model cannot be loaded; nothing remains loaded.
            NotReadyError: the service was started before.
        """
        with self._changed:
            if self._state != "new":
                raise NotReadyError(f"a service starts once, and this one is {self._state}")
            self._state, self._pid = "loading", os.getpid()
        try:
            for name, model in self._wanted.items():
                self._load(name, model)
        except BaseException as error:
            self._last_error = str(error)
            self._close_models()
            self._state = "failed"
            raise
        self._alarms = Alarms()
        self._workers = [
            threading.Thread(target=self._work, name=f"goc-worker-{i}", daemon=True)
            for i in range(self.limits.workers)
        ]
        if not self._begin():
            self._workers = []
            self.close()
            raise NotReadyError(CLOSED)
        logger.info("the service is ready with %s", ", ".join(self._models))

    def _begin(self) -> bool:
        """Begin to work, unless the service was closed while it loaded."""
        with self._changed:
            if self._state != "loading":
                return False
            self._state = "ready"
            for worker in self._workers:
                worker.start()
            return True

    def _load(self, name: str, model: HostedModel) -> None:
        loaded = self._models[name] = loaded_model(name, model, self.limits)
        for plan in loaded.plans.values():
            plan.pipeline.warmup(model.warmup_images)
        self._reports.loaded(name, loaded)

    def ready(self) -> bool:
        """Whether requests are accepted: from the end of the warm-up to the start of draining."""
        return self._state == "ready" and os.getpid() == self._pid

    def check_ready(self) -> None:
        """Check that requests are accepted.

        Raises:
            NotReadyError: the service has not started, drains or is closed.
        """
        if self._state != "ready":
            raise NotReadyError(f"the service accepts no requests, it is {self._state}")

    def health(self) -> Health:
        """Describe the state; cheap, and possible in every state."""
        running = self._running()
        waiting = max(0, len(self._tickets) - running)
        models = {name: model.describe() for name, model in list(self._models.items())}
        return Health(self._state, running, waiting, self._last_error, models)

    @property
    def models(self) -> Mapping[str, LoadedModel]:
        """The models that are loaded so far, by name."""
        return dict(self._models)

    def submit(self, request: ImageRequest) -> Future[Result]:
        """Put a request into the queue.

        Returns:
            The future result. An image that is not finite is in its ``errors`` and not an error of
            the request. Cancelling the future cancels the request.

        Raises:
            UsageError: the request does not fit the model or the limits.
            OverloadedError: the queue is full; ``retry_after`` estimates when it has room.
            NotReadyError: the service has not started, drains or is closed.
        """
        ticket = self._admit(request)
        for error in self._enqueue([ticket]):
            raise error
        return ticket.future

    def submit_many(self, requests: Iterable[ImageRequest]) -> list[Future[Result]]:
        """Put requests into the queue at once, for a host that has made a batch of them already.

        Those that fit together run together, also if the service has no delay for batching.

        Returns:
            A future per request. That of a request that `submit` would refuse has the error.
        """
        futures: list[Future[Result]] = []
        tickets: list[Ticket] = []
        for request in requests:
            try:
                tickets.append(self._admit(request))
            except GocError as error:
                refused: Future[Result] = Future()
                refused.set_exception(error)
                futures.append(refused)
            else:
                futures.append(tickets[-1].future)
        self._enqueue(tickets)
        return futures

    def _admit(self, request: ImageRequest) -> Ticket:
        """Make the ticket of a request, and watch its deadline and token."""
        if os.getpid() != self._pid:
            raise EnvironmentUnsupportedError(FORKED)
        try:
            self.check_ready()
            ticket = admitted(request, self._models, self.limits)
        except (NotReadyError, UsageError) as error:
            self._reports.refused(error)
            raise
        with self._changed:
            self.check_ready()
            self._tickets[ticket.future] = ticket
        ticket.end_early(self._alarms)
        ticket.future.add_done_callback(self._ended)
        return ticket

    def _enqueue(self, tickets: Sequence[Ticket]) -> list[GocError]:
        """Let tickets wait; those without room fail, with the errors that are returned."""
        ahead = self._queue.images * self._runner.seconds_per_image / self.limits.workers
        refused = self._queue.put_all(tickets, max(0.1, ahead / 2))
        for ticket, error in refused:
            ticket.fail(error)
        self._report_load()
        return [error for _, error in refused]

    def generate(self, request: ImageRequest) -> Result:
        """Put a request into the queue, and wait for its result.

        Raises:
            CancelledError: the token of the request was cancelled.
            DeadlineError: the request did not end in time.
            GocError: as `submit`, or the run failed.
        """
        future = self.submit(request)
        try:
            return future.result()
        except FutureCancelledError as cause:
            raise CancelledError("the request was cancelled") from cause
        finally:
            future.cancel()  # An interrupted wait ends the request too.

    async def agenerate(self, request: ImageRequest) -> Result:
        """Wait for a result in asyncio; cancelling the task cancels the request.

        Raises:
            GocError: as `generate`.
        """
        return await asyncio.wrap_future(self.submit(request))

    def drain(self, timeout: float | None = None) -> bool:
        """Accept no more requests, and wait until those that were accepted have ended.

        Args:
            timeout: seconds to wait; None waits as long as it takes.

        Returns:
            Whether all requests have ended.

        Raises:
            UsageError: it is called in a thread of the service, such as by a callback.
        """
        self._refuse_own_thread("drain")
        with self._changed:
            if self._state == "ready":
                self._state = "draining"
        self._queue.hurry()
        with self._changed:
            return self._changed.wait_for(lambda: not self._tickets, timeout)

    def close(self) -> None:
        """Free everything. Requests that run end normally, and those that wait fail.

        Closing twice is allowed. `drain` comes before it if no request may be lost.

        Raises:
            UsageError: it is called in a thread of the service, such as by a callback.
        """
        self._refuse_own_thread("close")
        with self._changed:
            if self._state != "failed":
                self._state = "closed"
        for ticket in self._queue.close():
            ticket.fail(NotReadyError(CLOSED))
        if os.getpid() != self._pid:
            return  # The threads and engines belong to the parent process.
        for worker in self._workers:
            worker.join()
        if self._alarms is not None:
            self._alarms.close()
            self._alarms = None
        self._workers = []
        self._close_models()

    def __enter__(self) -> Service:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> Any:
        raise TypeError("a service cannot be pickled; start one in the other process")

    def _refuse_own_thread(self, name: str) -> None:
        here = threading.current_thread()
        if here in self._workers or (self._alarms is not None and self._alarms.runs_in(here)):
            raise UsageError(OWN_THREAD.format(name=name))

    def _close_models(self) -> None:
        for model in self._models.values():
            for plan in model.plans.values():
                plan.pipeline.close()

    def _work(self) -> None:
        while batch := self._queue.take():
            self._run(batch)
            batch.clear()  # It holds the results, and the next batch may be late.

    def _run(self, batch: Sequence[Ticket]) -> None:
        started = time.monotonic()
        for ticket in batch:
            ticket.started = started
        self._report_load()
        self._runner.run(batch)

    def _ended(self, future: Future[Result]) -> None:
        """Report a request that has ended, in the thread that ended it.

        The future is not told its ticket, because a cycle of both would keep the result in memory.
        """
        ticket = self._tickets[future]
        error = ticket.error
        ticket.watch.close()
        self._queue.discard(ticket)
        if error is not None and not isinstance(error, EXPECTED):
            self._last_error = f"{type(error).__name__}: {error}"
        try:
            self._reports.ended(ticket, error)
        finally:  # A handler of the log may raise.
            with self._changed:
                del self._tickets[future]
                self._changed.notify_all()
            self._report_load()

    def _report_load(self) -> None:
        with self._reporting:  # so that the last report has the last numbers
            self._reports.load(self._queue.images, self._running())

    def _running(self) -> int:
        return sum(ticket.started is not None for ticket in list(self._tickets.values()))
