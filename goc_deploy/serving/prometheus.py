"""Metrics of a service for Prometheus, with the package ``prometheus-client``."""

from __future__ import annotations

from typing import Any

from goc_deploy.errors import EnvironmentUnsupportedError
from goc_deploy.serving.metrics import INSTRUMENTS, Instrument


class PrometheusMetrics:
    """Keeps metrics in a registry of prometheus-client.

    Args:
        registry: a ``CollectorRegistry``; None makes one, so that nothing collides with metrics of
            the program.

    Attributes:
        registry: the registry.

    Raises:
        EnvironmentUnsupportedError: prometheus-client is not installed.
    """

    def __init__(self, registry: Any = None) -> None:
        try:
            import prometheus_client as library
        except ImportError as cause:
            raise EnvironmentUnsupportedError(
                "metrics for Prometheus need prometheus-client; run: pip install "
                "'goc_deploy[serve]'"
            ) from cause
        self._library = library
        self.registry = library.CollectorRegistry() if registry is None else registry
        self._collectors = {one.name: self._collector(one) for one in INSTRUMENTS}

    def _collector(self, one: Instrument) -> Any:
        about = (one.name, one.about, one.labels)
        if one.kind == "counter":
            return self._library.Counter(*about, registry=self.registry)
        if one.kind == "gauge":
            return self._library.Gauge(*about, registry=self.registry)
        return self._library.Histogram(*about, registry=self.registry, buckets=one.buckets)

    def _of(self, instrument: Instrument, labels: dict[str, str]) -> Any:
        collector = self._collectors[instrument.name]
        return collector.labels(**labels) if labels else collector

    def add(self, instrument: Instrument, amount: float, **labels: str) -> None:
        """See `goc_deploy.serving.metrics.Metrics.add`."""
        self._of(instrument, labels).inc(amount)

    def set(self, instrument: Instrument, value: float, **labels: str) -> None:
        """See `goc_deploy.serving.metrics.Metrics.set`."""
        self._of(instrument, labels).set(value)

    def observe(self, instrument: Instrument, value: float, **labels: str) -> None:
        """See `goc_deploy.serving.metrics.Metrics.observe`."""
        self._of(instrument, labels).observe(value)

    def text(self) -> bytes:
        """Return the metrics in the text format of Prometheus, for an endpoint ``/metrics``."""
        page: bytes = self._library.generate_latest(self.registry)
        return page
