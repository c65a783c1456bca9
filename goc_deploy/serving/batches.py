"""Running a batch of tickets as one call of their pipeline, with an own result for each."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from goc_deploy.cancellation import CallLimits, CancelToken
from goc_deploy.errors import VerificationError
from goc_deploy.runtime.generation import Extras
from goc_deploy.runtime.request import joined
from goc_deploy.runtime.results import Result
from goc_deploy.runtime.step_events import StepEvent, StepHook
from goc_deploy.serving.queue import Ticket
from goc_deploy.serving.reports import Reports


class BatchRunner:
    """Runs batches, in any number of threads.

    Args:
        reports: where runs are reported.
        log_prompts: whether the log may show parts of prompts.

    Attributes:
        seconds_per_image: estimated from the last batches; 0 before the first.
    """

    def __init__(self, reports: Reports, *, log_prompts: bool) -> None:
        self._reports, self._log_prompts = reports, log_prompts
        self.seconds_per_image = 0.0

    def run(self, tickets: Sequence[Ticket]) -> None:
        """Run tickets of one plan together; every ticket has a result or an error afterwards.

        If the run fails, each ticket runs alone, so that only those fail that cause the error.
        """
        started = time.monotonic()
        try:
            self._run_or_split(tickets)
        except BaseException as error:  # such as SystemExit in a callback
            for ticket in tickets:
                ticket.fail(error)
        seconds = (time.monotonic() - started) / sum(ticket.images for ticket in tickets)
        self.seconds_per_image = 0.8 * (self.seconds_per_image or seconds) + 0.2 * seconds

    def _run_or_split(self, tickets: Sequence[Ticket]) -> None:
        ready = [ticket for ticket in tickets if self._is_prepared(ticket)]
        if not ready:
            return
        try:
            self._run(ready)
        except Exception as error:
            if len(ready) == 1:
                ready[0].fail(error)
                return
            for ticket in ready:
                if not ticket.ended:
                    self._run_or_split([ticket])

    def _is_prepared(self, ticket: Ticket) -> bool:
        """Encode the prompts of a ticket; if they are wrong, the ticket fails."""
        if ticket.ended:
            return False
        request, pipeline = ticket.request, ticket.plan.pipeline
        ticket.started = ticket.started or time.monotonic()
        if ticket.drawing is None:
            try:
                embeds = pipeline.encode(
                    request.prompts or (), request.negative_prompts, log_prompts=self._log_prompts
                )
                ticket.drawing = pipeline.drawing(
                    request.labels,
                    embeds,
                    seed=request.seed,
                    cfg_scale=request.cfg_scale,
                    cfg_channels=request.cfg_channels,
                    guidance=request.guidance,
                    cfg_scale_2=request.cfg_scale_2,
                )
            except Exception as error:
                ticket.fail(error)
                return False
        return True

    def _run(self, tickets: Sequence[Ticket]) -> None:
        plan, started = tickets[0].plan, time.perf_counter()
        drawing = joined([ticket.drawing for ticket in tickets if ticket.drawing is not None])
        extras = Extras(
            callback=_callback_of(tickets), limits=_limits_of(tickets), on_nonfinite="mark"
        )
        whole = plan.pipeline.draw(drawing, extras)
        seconds = time.perf_counter() - started
        self._reports.ran(plan, whole, seconds)
        first = 0
        for ticket in tickets:
            part = range(first, first + ticket.images)
            ticket.succeed(_result_of(ticket, part, whole, seconds))
            first = part.stop


def _result_of(ticket: Ticket, part: range, whole: Result, seconds: float) -> Result:
    """The result of one ticket; ``part`` are its images in the batch."""
    cut = slice(part.start, part.stop)
    errors = {
        image: VerificationError(f"the latents of image {image} are not finite; use a milder plan")
        for image, index in enumerate(part)
        if index in whole.errors
    }
    about: dict[str, Any] = {
        "request_id": ticket.request_id,
        "model": ticket.plan.model,
        "images": len(part),
        "batch_images": len(whole.latents),
        "queue_ms": 1e3 * ((ticket.started or ticket.arrived) - ticket.arrived),
        "run_ms": 1e3 * seconds,
    }
    images = None if whole.images is None else whole.images[cut].copy()
    report = {**whole.report, **about}
    return Result(images, whole.latents[cut].copy(), None, report, errors)


def _limits_of(tickets: Sequence[Ticket]) -> CallLimits | None:
    """Limits that end the run if every ticket has ended.

    On a GPU, where limits cost time, there are none unless a ticket has some. The run of a future
    that is cancelled then ends normally.
    """
    if not tickets[0].plan.pipeline.on_cpu and not any(ticket.limits for ticket in tickets):
        return None
    token = CancelToken()
    left = {ticket.future for ticket in tickets}

    def ended(future: Future[Result]) -> None:
        left.discard(future)
        if not left:
            token.cancel()

    for ticket in tickets:
        ticket.future.add_done_callback(ended)
    return CallLimits(token)


def _callback_of(tickets: Sequence[Ticket]) -> StepHook | None:
    """A callback that passes each event on to the tickets that have one, with their images."""
    wanted: list[tuple[Ticket, range]] = []
    first = 0
    for ticket in tickets:
        if ticket.request.callback is not None:
            wanted.append((ticket, range(first, first + ticket.images)))
        first += ticket.images
    if not wanted:
        return None
    return lambda event: _pass_on(event, wanted)


def _pass_on(event: StepEvent, wanted: Sequence[tuple[Ticket, range]]) -> None:
    errors: list[Exception] = []
    for ticket, own in wanted:
        # A request that is larger than a batch has some of its images in an event.
        start = max(own.start, event.first_image)
        stop = min(own.stop, event.first_image + event.images)
        callback = ticket.request.callback
        if callback is None or start >= stop or ticket.ended:
            continue
        part = event.part(
            range(start - event.first_image, stop - event.first_image), start - own.start
        )
        try:
            callback(part)
        except Exception as error:
            errors.append(error)
        except BaseException as error:  # such as SystemExit, which must not end the other requests
            ticket.fail(error)
    if errors:
        raise errors[0]  # It is logged, and the run continues.
