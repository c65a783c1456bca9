"""A bounded queue of requests, from which workers take batches of compatible requests."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Hashable, Iterable
from concurrent.futures import Future, InvalidStateError
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from threading import TIMEOUT_MAX

from goc_deploy.cancellation import CallLimits
from goc_deploy.errors import (
    CancelledError,
    DeadlineError,
    GocError,
    NotReadyError,
    OverloadedError,
)
from goc_deploy.runtime.request import Drawing
from goc_deploy.runtime.results import Result
from goc_deploy.serving.alarms import Alarms
from goc_deploy.serving.hosted import HostedPlan
from goc_deploy.serving.requests import ImageRequest

CLOSED = "the service is closed"


@dataclass(slots=True, eq=False)
class Ticket:
    """A request that waits or runs.

    Attributes:
        request: what was asked for.
        request_id: its name in logs and reports.
        plan: the plan that draws it.
        images: number of images.
        compatible: equal for requests that can run together.
        drawing: its images, or None as long as its prompts are not encoded.
        limits: its deadline and token.
        arrived: when it was submitted, on the clock of `time.monotonic`.
        started: when it began to run, or None.
        future: its result or error.
        watch: what is undone when the request ends.
    """

    request: ImageRequest
    request_id: str
    plan: HostedPlan
    images: int
    compatible: Hashable
    drawing: Drawing | None
    limits: CallLimits | None
    arrived: float = field(default_factory=time.monotonic)
    started: float | None = None
    future: Future[Result] = field(default_factory=Future)
    watch: ExitStack = field(default_factory=ExitStack)

    @property
    def ended(self) -> bool:
        """Whether the request has a result or an error."""
        return self.future.done()

    @property
    def error(self) -> BaseException | None:
        """The error of a request that has ended, or None."""
        if self.future.cancelled():
            return CancelledError("the request was cancelled")
        return self.future.exception()

    def succeed(self, result: Result) -> None:
        """End with a result, unless the request ended before."""
        with suppress(InvalidStateError):
            self.future.set_result(result)

    def fail(self, error: BaseException) -> None:
        """End with an error, unless the request ended before."""
        with suppress(InvalidStateError):
            self.future.set_exception(error)

    def end_early(self, alarms: Alarms | None) -> None:
        """Fail when the token is cancelled or the deadline is over, until `watch` is closed."""
        limits = self.limits
        if limits is None:
            return
        if limits.token is not None:
            error = CancelledError("the request was cancelled through its token")
            self.watch.enter_context(limits.token.calling(lambda: self.fail(error)))
        if limits.seconds is not None and alarms is not None:
            late = DeadlineError(
                f"the request did not end within its deadline of {limits.seconds:g} s"
            )
            self.watch.callback(alarms.at(limits.ends_at, lambda: self.fail(late)))


class BatchQueue:
    """Tickets by what they are compatible with; the oldest are taken first.

    Args:
        most_images: images of all tickets that wait.
        delay_seconds: how long the first ticket of a batch waits for more.
    """

    def __init__(self, most_images: int, delay_seconds: float) -> None:
        self._most, self._delay = most_images, delay_seconds
        self._waiting: OrderedDict[Hashable, list[Ticket]] = OrderedDict()
        self._changed = threading.Condition()
        self._images = 0
        self._closed, self._hurried = False, False

    @property
    def images(self) -> int:
        """Number of images that wait."""
        return self._images

    def put(self, ticket: Ticket, retry_after: float) -> None:
        """Append a ticket.

        Raises:
            OverloadedError: there is no room for its images.
            NotReadyError: the queue is closed.
        """
        with self._changed:
            if self._closed:
                raise NotReadyError(CLOSED)
            if self._images + ticket.images > self._most:
                raise OverloadedError(
                    f"{self._images} images wait already and the queue takes {self._most}; try "
                    f"again in {retry_after:.1f} s",
                    retry_after,
                )
            self._waiting.setdefault(ticket.compatible, []).append(ticket)
            self._images += ticket.images
            self._changed.notify()

    def put_all(
        self, tickets: Iterable[Ticket], retry_after: float
    ) -> list[tuple[Ticket, GocError]]:
        """Append tickets at once, so that a worker finds all of them.

        Returns:
            Tickets that were refused, each with the error of `put`.
        """
        refused: list[tuple[Ticket, GocError]] = []
        with self._changed:
            for ticket in tickets:
                try:
                    self.put(ticket, retry_after)
                except (NotReadyError, OverloadedError) as error:
                    refused.append((ticket, error))
        return refused

    def discard(self, ticket: Ticket) -> None:
        """Remove a ticket if it waits."""
        with self._changed:
            if ticket in self._waiting.get(ticket.compatible, ()):
                self._remove(ticket)

    def take(self) -> list[Ticket]:
        """Wait for the next batch; an empty list if the queue is closed.

        A batch is taken if it is full, or if its oldest ticket has waited long enough.
        """
        with self._changed:
            while not self._closed:
                now = time.monotonic()
                soonest: float | None = None
                for tickets in self._waiting.values():
                    batch, full = _batch(tickets)
                    left = 0.0 if full or self._hurried else batch[0].arrived + self._delay - now
                    if left <= 0:
                        for ticket in batch:
                            self._remove(ticket)
                        if self._waiting:
                            self._changed.notify()  # Another worker may take the next batch.
                        return batch
                    soonest = left if soonest is None else min(soonest, left)
                self._changed.wait(None if soonest is None else min(soonest, TIMEOUT_MAX))
            return []

    def hurry(self) -> None:
        """Let no ticket wait for others from now on."""
        with self._changed:
            self._hurried = True
            self._changed.notify_all()

    def close(self) -> list[Ticket]:
        """Wake all workers, and return the tickets that wait."""
        with self._changed:
            self._closed = True
            left = [ticket for tickets in self._waiting.values() for ticket in tickets]
            self._waiting.clear()
            self._images = 0
            self._changed.notify_all()
            return left

    def _remove(self, ticket: Ticket) -> None:
        tickets = self._waiting[ticket.compatible]
        tickets.remove(ticket)
        self._images -= ticket.images
        # Groups are in the order of their oldest tickets, so that none waits for ever.
        del self._waiting[ticket.compatible]
        if tickets:
            self._waiting[ticket.compatible] = tickets
            oldest = sorted(self._waiting.items(), key=lambda group: group[1][0].arrived)
            self._waiting = OrderedDict(oldest)


def _batch(tickets: list[Ticket]) -> tuple[list[Ticket], bool]:
    """The oldest tickets that fit into a batch, and whether no other could be added."""
    most, images, batch = tickets[0].plan.batch_images, 0, list[Ticket]()
    for ticket in tickets:
        if batch and images + ticket.images > most:
            return batch, True
        batch.append(ticket)
        images += ticket.images
    return batch, images >= most
