"""What a service counts and measures, behind a protocol that adapters implement."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal, Protocol

logger = logging.getLogger(__name__)

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
SIZES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
PLAN = ("model", "plan")


@dataclass(frozen=True, slots=True)
class Instrument:
    """One metric.

    Attributes:
        name: its name with ``goc_``, in the style of Prometheus without ``_total``.
        kind: ``counter``, ``gauge`` or ``histogram``.
        about: what it counts or measures.
        labels: names of its labels.
        buckets: upper bounds of the buckets of a histogram.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    about: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


REQUESTS = Instrument(
    "goc_requests",
    "counter",
    "Requests by outcome: ok, or the code of the error.",
    (*PLAN, "outcome"),
)
QUEUE = Instrument(
    "goc_queue_seconds", "histogram", "Time from submission to the run.", PLAN, SECONDS
)
RUN = Instrument(
    "goc_run_seconds", "histogram", "Time of the run of a batch with decoding.", PLAN, SECONDS
)
BATCH = Instrument("goc_batch_images", "histogram", "Images of a batch.", PLAN, SIZES)
IMAGES = Instrument("goc_images", "counter", "Images of runs.", PLAN)
NONFINITE = Instrument("goc_nonfinite_images", "counter", "Images that are not finite.", PLAN)
STEPS = Instrument(
    "goc_steps", "counter", "Sampling steps by kind: full, collapsed, mixed.", (*PLAN, "kind")
)
UNITS = Instrument(
    "goc_units",
    "counter",
    "Units of the model in all steps: computed, or predicted from the cache.",
    (*PLAN, "action"),
)
CACHE = Instrument(
    "goc_cache_bytes", "gauge", "Memory of the history of a session for a full batch.", PLAN
)
IN_FLIGHT = Instrument("goc_in_flight_requests", "gauge", "Requests that run.")
QUEUED = Instrument("goc_queued_images", "gauge", "Images of requests that wait.")
LOAD = Instrument("goc_load_seconds", "gauge", "Time of loading an engine directory.", ("model",))
BUILD = Instrument(
    "goc_build_info",
    "gauge",
    "Always 1; the labels identify the program and the engines.",
    ("version", "model", "backend", "fingerprint"),
)
INSTRUMENTS = (
    REQUESTS,
    QUEUE,
    RUN,
    BATCH,
    IMAGES,
    NONFINITE,
    STEPS,
    UNITS,
    CACHE,
    IN_FLIGHT,
    QUEUED,
    LOAD,
    BUILD,
)


class Metrics(Protocol):
    """Where a service reports to; every method may be called from any thread."""

    def add(self, instrument: Instrument, amount: float, **labels: str) -> None:
        """Increase a counter."""
        ...

    def set(self, instrument: Instrument, value: float, **labels: str) -> None:
        """Set a gauge."""
        ...

    def observe(self, instrument: Instrument, value: float, **labels: str) -> None:
        """Add a value to a histogram."""
        ...


class NoMetrics:
    """Keeps nothing."""

    def add(self, instrument: Instrument, amount: float, **labels: str) -> None:
        """Do nothing."""

    def set(self, instrument: Instrument, value: float, **labels: str) -> None:
        """Do nothing."""

    def observe(self, instrument: Instrument, value: float, **labels: str) -> None:
        """Do nothing."""


class IsolatedMetrics:
    """Passes values on, and logs the errors of the adapter instead of raising them.

    Args:
        metrics: the adapter.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics, self._failed = metrics, False

    def add(self, instrument: Instrument, amount: float, **labels: str) -> None:
        """See `Metrics.add`."""
        try:
            self._metrics.add(instrument, amount, **labels)
        except Exception:
            self._log(instrument)

    def set(self, instrument: Instrument, value: float, **labels: str) -> None:
        """See `Metrics.set`."""
        try:
            self._metrics.set(instrument, value, **labels)
        except Exception:
            self._log(instrument)

    def observe(self, instrument: Instrument, value: float, **labels: str) -> None:
        """See `Metrics.observe`."""
        try:
            self._metrics.observe(instrument, value, **labels)
        except Exception:
            self._log(instrument)

    def _log(self, instrument: Instrument) -> None:
        if not self._failed:
            self._failed = True
            logger.exception("metric %s was not recorded; the service goes on", instrument.name)
