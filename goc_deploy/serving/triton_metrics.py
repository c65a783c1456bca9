"""Metrics of a service as custom metrics of Triton Inference Server."""

from __future__ import annotations

from typing import Any

from goc_deploy.errors import EnvironmentUnsupportedError
from goc_deploy.serving.metrics import INSTRUMENTS, Instrument


class TritonMetrics:
    """Keeps metrics in the server's registry, which it serves with its own at ``/metrics``.

    Instances of a model, which are processes, and models of one server have the same metrics. The
    label ``instance`` tells them apart.

    Args:
        pb_utils: the module ``triton_python_backend_utils``.
        instance: name of the instance of the model.

    Raises:
        EnvironmentUnsupportedError: the server has no custom histograms.
    """

    def __init__(self, pb_utils: Any, instance: str) -> None:
        if not hasattr(pb_utils.MetricFamily, "HISTOGRAM"):
            raise EnvironmentUnsupportedError(
                "this Triton Inference Server has no custom histograms; use 24.10 or later"
            )
        self._instance = instance
        self._families = {
            one.name: pb_utils.MetricFamily(
                name=one.name,
                description=one.about,
                kind=getattr(pb_utils.MetricFamily, one.kind.upper()),
            )
            for one in INSTRUMENTS
        }
        self._metrics: dict[tuple[str, ...], Any] = {}

    def _of(self, instrument: Instrument, labels: dict[str, str]) -> Any:
        key = (instrument.name, *(labels[name] for name in instrument.labels))
        if key not in self._metrics:
            more = {"buckets": list(instrument.buckets)} if instrument.buckets else {}
            self._metrics[key] = self._families[instrument.name].Metric(
                labels={**labels, "instance": self._instance}, **more
            )
        return self._metrics[key]

    def add(self, instrument: Instrument, amount: float, **labels: str) -> None:
        """See `goc_deploy.serving.metrics.Metrics.add`."""
        self._of(instrument, labels).increment(amount)

    def set(self, instrument: Instrument, value: float, **labels: str) -> None:
        """See `goc_deploy.serving.metrics.Metrics.set`."""
        self._of(instrument, labels).set(value)

    def observe(self, instrument: Instrument, value: float, **labels: str) -> None:
        """See `goc_deploy.serving.metrics.Metrics.observe`."""
        self._of(instrument, labels).observe(value)
