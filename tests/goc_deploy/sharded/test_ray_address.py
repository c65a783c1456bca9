"""goc-run --ray HOST:PORT, in a process that is connected to no cluster."""

from __future__ import annotations

import socket
import time

import pytest

from goc_deploy.errors import EnvironmentUnsupportedError
from goc_deploy.sharded.ray_cluster import connected

pytest.importorskip("ray", reason="ray is not installed (extra ray)")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_an_address_without_a_cluster_is_refused_at_once(host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as one:
        port = one.getsockname()[1]
    started = time.monotonic()
    with (
        pytest.raises(EnvironmentUnsupportedError, match=f"used at {host}:{port}: .*refused"),
        connected(f"{host}:{port}"),
    ):
        pass
    assert time.monotonic() - started < 30
