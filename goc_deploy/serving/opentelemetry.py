"""Metrics of a service for OpenTelemetry, with its API package alone.

The program chooses the SDK and the exporter. Without an SDK, nothing is kept.
"""

from __future__ import annotations

from typing import Any

from goc_deploy.errors import EnvironmentUnsupportedError
from goc_deploy.serving.metrics import INSTRUMENTS, Instrument
from goc_deploy.version import __version__


class OpenTelemetryMetrics:
    """Reports metrics to a meter of OpenTelemetry.

    Args:
        meter_provider: a ``MeterProvider``; None takes the one that the program has set.

    Raises:
        EnvironmentUnsupportedError: opentelemetry-api is not installed.
    """

    def __init__(self, meter_provider: Any = None) -> None:
        try:
            from opentelemetry.metrics import get_meter
        except ImportError as cause:
            raise EnvironmentUnsupportedError(
                "metrics for OpenTelemetry need opentelemetry-api; run: pip install "
                "'goc_deploy[serve]'"
            ) from cause
        meter = get_meter("goc_deploy", __version__, meter_provider)
        self._instruments = {one.name: _created(meter, one) for one in INSTRUMENTS}

    def add(self, instrument: Instrument, amount: float, **labels: str) -> None:
        """See `goc_deploy.serving.metrics.Metrics.add`."""
        self._instruments[instrument.name].add(amount, labels)

    def set(self, instrument: Instrument, value: float, **labels: str) -> None:
        """See `goc_deploy.serving.metrics.Metrics.set`."""
        self._instruments[instrument.name].set(value, labels)

    def observe(self, instrument: Instrument, value: float, **labels: str) -> None:
        """See `goc_deploy.serving.metrics.Metrics.observe`."""
        self._instruments[instrument.name].record(value, labels)


def _created(meter: Any, one: Instrument) -> Any:
    unit = "s" if one.name.endswith("_seconds") else "By" if one.name.endswith("_bytes") else ""
    if one.kind == "counter":
        return meter.create_counter(one.name, unit, one.about)
    if one.kind == "gauge":
        return meter.create_gauge(one.name, unit, one.about)
    buckets = {"explicit_bucket_boundaries_advisory": list(one.buckets)}
    return meter.create_histogram(one.name, unit, one.about, **buckets)
