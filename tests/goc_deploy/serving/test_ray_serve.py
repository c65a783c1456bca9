"""The application on Ray Serve, started with ``serve run``."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from goc_deploy.errors import EnvironmentUnsupportedError, NotReadyError
from tests.drawn import digits_drawn
from tests.goc_deploy.serving.running import GENERATE, HEADERS, TOKEN, free_port, pixels
from tests.goc_deploy.sharded.test_ray import LOOPBACK

pytest.importorskip("ray", reason="ray is not installed (extra ray)")
httpx = pytest.importorskip("httpx")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # when ray.serve is imported

IMPORT_PATH = "goc_deploy.serving.ray_serve:application"
CLIENTS = 6
SERVE = "from ray.serve.scripts import cli; cli()"  # the command `serve`


class Cluster:
    """``serve run`` with a cluster of its own, of four logical CPUs."""

    def __init__(self, engine: Path, folder: Path) -> None:
        common = {"engine_dirs": str(engine), "plans": "none;fora:2", "backend": "onnxruntime"}
        narrow = {"max_ongoing_requests": 1, "max_queued_requests": 1}
        applications = [
            {"name": "wide", "route_prefix": "/", "args": {"num_replicas": 2, **common}},
            {"name": "narrow", "route_prefix": "/narrow", "args": {**narrow, **common}},
        ]
        for one in applications:
            one["import_path"] = IMPORT_PATH
        port = free_port()
        config = {"http_options": {"host": "127.0.0.1", "port": port}, "applications": applications}
        (folder / "serve.yaml").write_text(json.dumps(config))  # JSON is YAML
        environment = {
            "GOC_SERVE_TOKEN": TOKEN,
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_OVERRIDE_RESOURCES": json.dumps({"CPU": 4, "object_store_memory": 100 * 2**20}),
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
        self.log = folder / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", SERVE, "run", str(folder / "serve.yaml")],
                env={**os.environ, **environment},
                stdout=log,
                stderr=log,
                cwd=folder,
            )
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=HEADERS, timeout=60)

    def wait(self) -> None:
        deadline = time.monotonic() + 240
        while not (
            self._ready("/") and self._ready("/narrow/") and len(self.replicas("wide")) == 2
        ):
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.2)

    def _ready(self, prefix: str) -> bool:
        try:
            return bool(self.client.get(f"{prefix}health/ready").status_code == 200)
        except httpx.TransportError:
            return False

    def replicas(self, name: str) -> list[psutil.Process]:
        """The processes of the replicas of an application."""
        title = f"ray::ServeReplica:{name}:"
        below = psutil.Process(self.process.pid).children(recursive=True)
        found = []
        for one in below:
            try:
                if title in " ".join(one.cmdline()):
                    found.append(one)
            except psutil.Error:
                continue
        return found

    def ask(self, prefix: str = "", **fields: Any) -> Any:
        return self.client.post(prefix + GENERATE, json={"prompt": "3", **fields})


@pytest.fixture(scope="module")
def cluster(demo_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    running = Cluster(demo_engine, tmp_path_factory.mktemp("serve"))
    try:
        running.wait()
        yield running
    finally:
        running.client.close()
        below = psutil.Process(running.process.pid).children(recursive=True)
        running.process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a background job ignores SIGINT
            running.process.wait(60)
        running.process.kill()
        running.process.wait()
        for one in psutil.wait_procs(below, 10)[1]:
            one.kill()


@pytest.fixture(scope="module")
def expected(demo_engine: Path) -> list[np.ndarray]:
    """The picture of the library for every seed, drawn with one thread as in the replicas."""
    return digits_drawn(demo_engine, 3, range(8), threads=1, plan="fora:2")


def test_pictures_are_those_of_the_library(cluster: Cluster, expected: list[np.ndarray]) -> None:
    for prefix in ("", "/narrow"):
        answer = cluster.ask(prefix, seed=2, plan="fora:2").json()
        np.testing.assert_array_equal(pixels(answer["data"][0]["b64_json"]), expected[2])


def test_it_needs_the_token_and_listens_on_the_loopback_address(cluster: Cluster) -> None:
    refused = httpx.post(f"{cluster.client.base_url}{GENERATE}", json={"prompt": "3"})
    assert refused.status_code == 401
    replicas = {one.pid for name in ("wide", "narrow") for one in cluster.replicas(name)}
    open_to_all = set()
    for one in psutil.Process(cluster.process.pid).children(recursive=True):
        try:
            connections = one.net_connections("inet")
        except psutil.Error:
            continue
        addresses = {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}
        if not addresses <= LOOPBACK:
            open_to_all.add(one.pid)
    # Ray 2.60 has no option for the gRPC port of replicas, which needs Ray's token if that is on.
    assert open_to_all <= replicas


def test_requests_for_which_there_is_no_room_are_told_when_to_come_back(cluster: Cluster) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda seed: cluster.ask("/narrow", n=8, seed=seed), range(8)))
    refused = [one for one in answers if one.status_code != 200]
    assert 1 <= len(refused) < 8
    assert {(one.status_code, one.headers.get("retry-after")) for one in refused} == {(503, "1")}


def test_killing_a_replica_loses_only_the_requests_in_flight_on_it(
    cluster: Cluster, expected: list[np.ndarray]
) -> None:
    killed: list[float] = []

    def requests(client: int) -> list[tuple[float, Any, int]]:
        """Ask until a while after the kill, and once then; start, answer and seed of each."""
        found: list[tuple[float, Any, int]] = []
        while not killed or time.monotonic() < killed[0] + 3 or found[-1][0] <= killed[0]:
            seed = (client + len(found)) % len(expected)
            found.append((time.monotonic(), cluster.ask(seed=seed, plan="fora:2"), seed))
        return found

    before = {one.pid for one in cluster.replicas("wide")}
    with ThreadPoolExecutor(CLIENTS) as pool:
        futures = [pool.submit(requests, client) for client in range(CLIENTS)]
        time.sleep(2)
        victim = cluster.replicas("wide")[0]
        victim.kill()
        killed.append(time.monotonic())
        done = [one for future in futures for one in future.result()]
    lost = [started for started, answer, _ in done if answer.status_code != 200]
    assert len(lost) <= CLIENTS
    assert all(started <= killed[0] for started in lost)
    for _, answer, seed in done:
        if answer.status_code == 200:
            picture = pixels(answer.json()["data"][0]["b64_json"])
            np.testing.assert_array_equal(picture, expected[seed])
    assert sum(started > killed[0] for started, _, _ in done) >= CLIENTS
    cluster.wait()  # until there are two replicas again
    after = {one.pid for one in cluster.replicas("wide")}
    assert victim.pid not in after
    assert len(after & before) == 1
    assert cluster.ask(seed=1).status_code == 200


def test_a_replica_is_healthy_while_its_service_is_ready(
    demo_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from goc_deploy.serving.ray_serve import Replica, ReplicaOptions

    monkeypatch.delenv("GOC_SERVE_TOKEN", raising=False)
    options = ReplicaOptions(engine_dirs=(demo_engine,), plans=("none",), num_cpus=2)
    assert (options.serve_options().device, options.serve_options().threads) == ("cpu", 2)
    with pytest.raises(EnvironmentUnsupportedError, match="set it before `ray start`"):
        Replica(options.serve_options(), with_token=True)
    replica = Replica(options.serve_options(), with_token=False)
    replica.check_health()
    replica.__del__()
    with pytest.raises(NotReadyError, match="closed"):
        replica.check_health()


def test_resources_and_autoscaling_are_those_of_the_options() -> None:
    from goc_deploy.serving.ray_serve import ReplicaOptions, application

    words = {"engine_dirs": "/a;/b", "num_gpus": "1", "autoscaling": {"max_replicas": 8}}
    options = ReplicaOptions.model_validate(words)
    assert options.serve_options().engine_dirs == (Path("/a"), Path("/b"))
    assert options.serve_options().device == "cuda"
    deployment = application(options)._bound_deployment
    assert deployment.ray_actor_options == {"num_gpus": 1, "num_cpus": 1}
    config = deployment._deployment_config
    assert config.autoscaling_config.max_replicas == 8
    assert (config.max_ongoing_requests, config.max_queued_requests) == (64, 256)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"engine_dirs": "engine"}, "engine is relative"),
        ({"engine_dirs": "/a", "num_replicas": 2, "autoscaling": {}}, "leave out num_replicas"),
        ({"engine_dirs": "/a", "num_gpus": "2"}, "less than or equal to 1"),
        ({"engine_dirs": "/a", "port": "1"}, "Extra inputs are not permitted"),
    ],
)
def test_wrong_options_are_refused(words: dict[str, Any], message: str) -> None:
    from goc_deploy.serving.ray_serve import ReplicaOptions

    with pytest.raises(ValueError, match=message):
        ReplicaOptions.model_validate(words)
