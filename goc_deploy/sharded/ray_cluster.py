"""Connecting to a Ray cluster, or starting one on this machine, and what it has room for."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from goc_deploy.api.requirements import require
from goc_deploy.errors import EnvironmentUnsupportedError

LOCAL = "local"
LOOPBACK = ("127.0.0.1", "::1", "localhost")
LISTEN_SECONDS = 10.0
# With 0, Ray uses the loopback address on Linux too. It replaces 127.0.0.1 in its other settings by
# an address that other machines reach (Ray 2.60; a test looks at the sockets).
LOOPBACK_VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
OBJECT_STORE_BYTES = 100 * 2**20  # images go to disk, so almost nothing is stored
RELEASE_SECONDS = 15.0  # until a cluster notices that other workers have ended


@contextlib.contextmanager
def connected(address: str) -> Iterator[Any]:
    """Connect to a cluster; one that is started here listens on the loopback address only.

    A program that is connected already stays so.

    Args:
        address: ``local`` starts a cluster, ``auto`` and HOST:PORT name one.

    Yields:
        The module ``ray``.

    Raises:
        EnvironmentUnsupportedError: Ray is not installed, or there is no such cluster.
    """
    require("ray", "ray")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # otherwise Ray reports to its makers
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray warns without it
    if address == LOCAL:
        os.environ[LOOPBACK_VARIABLE] = "0"  # before the import, which reads it
    import ray

    if ray.is_initialized():
        yield ray
        return
    options: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": "error"}
    if address == LOCAL:
        options |= {
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
        }
    try:
        _check_listening(address, ray.util.get_node_ip_address)
        with _own_sigterm():
            ray.init(**options)
    except (OSError, RuntimeError, ValueError) as cause:
        raise EnvironmentUnsupportedError(
            f"Ray cannot be used at {address}: {cause}; start it with `ray start`, or leave out "
            "the address for a cluster on this machine"
        ) from cause
    try:
        module: Any = ray
        addresses = {node["NodeManagerAddress"] for node in module.nodes()}
        if address == LOCAL and addresses != {"127.0.0.1"}:
            raise EnvironmentUnsupportedError(
                "the Ray cluster of this machine would be open to the network, because ray was "
                f"imported before; set {LOOPBACK_VARIABLE}=0 in the environment"
            )
        yield ray
    finally:
        ray.shutdown()


def _check_listening(address: str, own_address: Callable[[], str]) -> None:
    """Check at once that something listens at HOST:PORT; Ray itself tries for minutes.

    Raises:
        OSError: nothing does.
    """
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdecimal():
        return
    host = host.strip("[]")
    try:
        socket.create_connection((host, int(port)), LISTEN_SECONDS).close()
    except OSError:
        if host not in LOOPBACK:
            raise
        # Ray takes the loopback address as another name of this machine.
        socket.create_connection((own_address(), int(port)), LISTEN_SECONDS).close()


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep the handler of SIGTERM, which Ray replaces."""
    kept = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread() and callable(kept):
            signal.signal(signal.SIGTERM, kept)


def number_of_workers(ray: Any, needs: Mapping[str, float], wanted: int | None) -> int:
    """Check that a cluster has room for workers now.

    Args:
        ray: the module, connected.
        needs: what a worker needs, by Ray's names ``CPU`` and ``GPU``.
        wanted: number of workers; None takes as many as there is room for.

    Returns:
        The number of workers.

    Raises:
        EnvironmentUnsupportedError: there is no room; the message has what is needed and there.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = sum(_room(node, needs) for node in nodes)
    deadline = time.monotonic() + RELEASE_SECONDS
    free = min(room, _room(ray.available_resources(), needs))
    while free < min(wanted or room, room) and time.monotonic() < deadline:
        time.sleep(0.1)
        free = min(room, _room(ray.available_resources(), needs))
    if free >= (wanted or 1):
        return wanted or free
    now = ray.available_resources()
    lines = ", ".join(
        f"{(wanted or 1) * need:g} {name} are needed and {now.get(name, 0):g} of "
        f"{sum(node.get(name, 0) for node in nodes):g} are available"
        for name, need in needs.items()
    )
    raise EnvironmentUnsupportedError(
        f"the Ray cluster has no room for {wanted or 1} workers: {lines}; use fewer `workers`, "
        "or wait until other jobs have ended"
    )


def _room(resources: Mapping[str, float], needs: Mapping[str, float]) -> int:
    return min(int(resources.get(name, 0) / need) for name, need in needs.items())
