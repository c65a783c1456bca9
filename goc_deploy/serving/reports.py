"""What a service reports about its requests and runs: metrics, and log records with fields."""

from __future__ import annotations

import logging
import time

from goc_deploy.errors import GocError
from goc_deploy.runtime.results import Result
from goc_deploy.serving import metrics as instruments
from goc_deploy.serving.hosted import HostedPlan, LoadedModel
from goc_deploy.serving.metrics import IsolatedMetrics, Metrics
from goc_deploy.serving.queue import Ticket
from goc_deploy.version import __version__

logger = logging.getLogger(__name__)


class Reports:
    """Reports to metrics and to the log.

    Args:
        metrics: adapter of a metrics library.
        log_prompts: whether log records have the prompts of requests.
    """

    def __init__(self, metrics: Metrics, *, log_prompts: bool) -> None:
        self._metrics, self._log_prompts = IsolatedMetrics(metrics), log_prompts

    def loaded(self, name: str, model: LoadedModel) -> None:
        """Report a model that was loaded and warmed up."""
        metrics = self._metrics
        for plan in model.plans.values():
            cache = plan.pipeline.plan_description["cache_bytes"]
            metrics.set(instruments.CACHE, cache, **_labels(plan))
        metrics.set(instruments.LOAD, model.load_seconds, model=name)
        backend, digest = str(model.describe()["backend"]), model.fingerprint
        about = {"version": __version__, "model": name, "backend": backend, "fingerprint": digest}
        metrics.set(instruments.BUILD, 1, **about)

    def refused(self, error: GocError) -> None:
        """Report a request without a ticket; its names are not kept, as anyone may send any."""
        self._metrics.add(instruments.REQUESTS, 1, outcome=outcome_of(error), model="", plan="")

    def load(self, images: int, requests: int) -> None:
        """Report how many images wait and how many requests run."""
        self._metrics.set(instruments.QUEUED, images)
        self._metrics.set(instruments.IN_FLIGHT, requests)

    def ran(self, plan: HostedPlan, whole: Result, seconds: float) -> None:
        """Report the run of a batch."""
        report, metrics, labels = whole.report, self._metrics, _labels(plan)
        metrics.observe(instruments.RUN, seconds, **labels)
        metrics.observe(instruments.BATCH, len(whole.latents), **labels)
        metrics.add(instruments.IMAGES, len(whole.latents), **labels)
        if whole.errors:
            metrics.add(instruments.NONFINITE, len(whole.errors), **labels)
        runs, computed = len(report["batches"]), report["computed_units"]
        for kind, count in report["step_kinds"].items():
            metrics.add(instruments.STEPS, runs * count, kind=kind, **labels)
        metrics.add(instruments.UNITS, runs * computed, action="computed", **labels)
        predicted = report["all_units"] - computed
        metrics.add(instruments.UNITS, runs * predicted, action="predicted", **labels)

    def ended(self, ticket: Ticket, error: BaseException | None) -> None:
        """Report a request that has ended."""
        now, outcome, labels = time.monotonic(), outcome_of(error), _labels(ticket.plan)
        started = now if ticket.started is None else ticket.started
        self._metrics.add(instruments.REQUESTS, 1, outcome=outcome, **labels)
        self._metrics.observe(instruments.QUEUE, started - ticket.arrived, **labels)
        fields: dict[str, object] = {
            "request_id": ticket.request_id,
            **labels,
            "outcome": outcome,
            "images": ticket.images,
            "queue_seconds": started - ticket.arrived,
            "run_seconds": now - started,
        }
        if self._log_prompts:
            fields["prompts"] = ticket.request.prompts
        logger.info("request %s: %s", ticket.request_id, outcome, extra=fields)


def outcome_of(error: BaseException | None) -> str:
    """The outcome of a request: ``ok``, the class of the error without ``Error``, or ``bug``."""
    if error is None:
        return "ok"
    if isinstance(error, GocError):
        return type(error).__name__.removesuffix("Error").lower()
    return "bug"


def _labels(plan: HostedPlan) -> dict[str, str]:
    return {"model": plan.model, "plan": plan.name}
