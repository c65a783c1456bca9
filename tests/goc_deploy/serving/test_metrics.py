from __future__ import annotations

import logging
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from goc_deploy.errors import EnvironmentUnsupportedError, NotReadyError, UsageError
from goc_deploy.runtime.step_events import StepEvent
from goc_deploy.serving import HostedModel, ImageRequest, Service
from goc_deploy.serving import metrics as instruments
from goc_deploy.serving.metrics import INSTRUMENTS, IsolatedMetrics, NoMetrics
from goc_deploy.serving.opentelemetry import OpenTelemetryMetrics
from goc_deploy.serving.prometheus import PrometheusMetrics

LABELS = {"model": "m", "plan": "fora-2"}


def serve(engine: Path, metrics: Any) -> None:
    """Two requests that succeed, of three images in all, and three that are refused."""
    model = HostedModel(engine, ("fora:2",), backend="onnxruntime")
    with Service({"m": model}, metrics=metrics) as service, np.errstate(all="ignore"):
        service.generate(ImageRequest("m", labels=[1, 2]))
        service.generate(ImageRequest("m", labels=[3]))
        for labels in ([10], []):
            with pytest.raises(UsageError):
                service.generate(ImageRequest("m", labels=labels))
    with pytest.raises(NotReadyError):
        service.generate(ImageRequest("m", labels=[1]))


def test_prometheus_has_the_numbers_of_the_requests(golden_engine: Path) -> None:
    pytest.importorskip("prometheus_client")
    metrics, other = PrometheusMetrics(), PrometheusMetrics()
    serve(golden_engine, metrics)
    sample = metrics.registry.get_sample_value
    assert sample("goc_requests_total", {**LABELS, "outcome": "ok"}) == 2
    assert sample("goc_requests_total", {"model": "", "plan": "", "outcome": "usage"}) == 2
    assert sample("goc_requests_total", {"model": "", "plan": "", "outcome": "notready"}) == 1
    assert sample("goc_images_total", LABELS) == 3
    assert sample("goc_batch_images_sum", LABELS) == 3
    assert sample("goc_queue_seconds_count", LABELS) == 2
    assert 0 < sample("goc_run_seconds_sum", LABELS) < 60
    assert sample("goc_steps_total", {**LABELS, "kind": "collapsed"}) == 20
    assert sample("goc_units_total", {**LABELS, "action": "computed"}) == 2 * 80
    assert sample("goc_units_total", {**LABELS, "action": "predicted"}) == 2 * 80
    assert sample("goc_cache_bytes", LABELS) > 0
    assert sample("goc_load_seconds", {"model": "m"}) > 0
    assert sample("goc_in_flight_requests") == 0
    assert b'goc_build_info{backend="onnxruntime",fingerprint="' in metrics.text()
    assert other.registry.get_sample_value("goc_images_total", LABELS) is None


def test_gauges_follow_a_request_that_is_cancelled_while_it_waits(golden_engine: Path) -> None:
    pytest.importorskip("prometheus_client")
    metrics, running, go = PrometheusMetrics(), threading.Event(), threading.Event()

    def hold(_event: StepEvent) -> None:
        running.set()
        go.wait(60)

    def gauges() -> tuple[float | None, float | None]:
        sample = metrics.registry.get_sample_value
        return sample("goc_in_flight_requests"), sample("goc_queued_images")

    model = HostedModel(golden_engine, ("fora:2",), backend="onnxruntime")
    with Service({"m": model}, metrics=metrics) as service:
        first = service.submit(ImageRequest("m", labels=[1], callback=hold))
        assert running.wait(60)
        second = service.submit(ImageRequest("m", labels=[2, 3]))
        assert gauges() == (1, 2)
        second.cancel()
        assert gauges() == (1, 0)
        go.set()
        first.result(60)
        assert service.drain(60)
    assert gauges() == (0, 0)


def test_opentelemetry_has_the_numbers_of_the_requests(golden_engine: Path) -> None:
    sdk = pytest.importorskip("opentelemetry.sdk.metrics")
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader

    reader = InMemoryMetricReader()
    provider = sdk.MeterProvider([reader])
    serve(golden_engine, OpenTelemetryMetrics(provider))
    (resource,) = reader.get_metrics_data().resource_metrics
    (scope,) = resource.scope_metrics
    points = {metric.name: list(metric.data.data_points) for metric in scope.metrics}
    assert {p.attributes["outcome"]: p.value for p in points["goc_requests"]} == {
        "ok": 2,
        "usage": 2,
        "notready": 1,
    }
    assert [point.value for point in points["goc_images"]] == [3]
    assert [point.sum for point in points["goc_batch_images"]] == [3]
    provider.shutdown()


def test_every_adapter_takes_every_instrument() -> None:
    pytest.importorskip("prometheus_client")
    pytest.importorskip("opentelemetry")
    for metrics in (PrometheusMetrics(), OpenTelemetryMetrics(), NoMetrics()):
        for one in INSTRUMENTS:
            labels = dict.fromkeys(one.labels, "x")
            report = {
                "counter": metrics.add,
                "gauge": metrics.set,
                "histogram": metrics.observe,
            }
            report[one.kind](one, 1.0, **labels)


def test_an_adapter_that_fails_is_logged_once_and_changes_nothing(
    golden_engine: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        def add(self, *_: Any, **__: Any) -> None:
            raise RuntimeError("no connection")

        set = observe = add

    with caplog.at_level(logging.ERROR):
        serve(golden_engine, Broken())
        IsolatedMetrics(Broken()).set(instruments.QUEUED, 1)
    assert caplog.text.count("was not recorded; the service goes on") == 2


@pytest.mark.parametrize(
    ("adapter", "package"),
    [(PrometheusMetrics, "prometheus_client"), (OpenTelemetryMetrics, "opentelemetry.metrics")],
)
def test_a_missing_package_is_named(
    adapter: Any, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(EnvironmentUnsupportedError, match=r"pip install 'goc_deploy\[serve\]'"):
        adapter()
