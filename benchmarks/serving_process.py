"""goc-serve in a process of its own, whose memory and file descriptors are watched."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

LOCAL = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Sample:
    """What a server holds at a moment.

    Attributes:
        seconds: time since the server was ready.
        resident_bytes: resident memory.
        descriptors: open file descriptors, sockets included.
        threads: threads.
    """

    seconds: float
    resident_bytes: int
    descriptors: int
    threads: int


class ServerProcess:
    """A server on the loopback address.

    Args:
        engine: the engine directory.
        options: further words of the command line.
        seconds: how long it may take to be ready.

    Attributes:
        url: its address.
        process_id: number of its process.

    Raises:
        RuntimeError: it ended, or was not ready in time.
    """

    def __init__(self, engine: Path, options: Sequence[str], seconds: float = 120) -> None:
        with socket.socket() as free:
            free.bind((LOCAL, 0))
            port = free.getsockname()[1]
        self.url = f"http://{LOCAL}:{port}"
        command = Path(sys.executable).with_name("goc-serve")
        environment = {k: v for k, v in os.environ.items() if k != "GOC_SERVE_TOKEN"}
        self._errors = TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [command, engine, "--port", str(port), *options],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
        )
        self.process_id = self._process.pid
        self._wait(seconds)
        self._ready = time.monotonic()

    def _wait(self, seconds: float) -> None:
        ends = time.monotonic() + seconds
        while time.monotonic() < ends and self._process.poll() is None:
            try:
                if httpx.get(f"{self.url}/health/ready").status_code == httpx.codes.OK:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        printed = self.printed()
        self.kill()
        raise RuntimeError(f"goc-serve is not ready: {printed}")

    def sample(self) -> Sample:
        """What the server holds now."""
        process = psutil.Process(self.process_id)
        return Sample(
            time.monotonic() - self._ready,
            process.memory_info().rss,
            process.num_fds(),
            process.num_threads(),
        )

    def batches(self) -> tuple[int, int]:
        """Number of batches, and of images in them, since the server started."""
        page = httpx.get(f"{self.url}/metrics").text
        found = {"goc_batch_images_count": 0.0, "goc_batch_images_sum": 0.0}
        for family in text_string_to_metric_families(page):
            for sample in family.samples:
                if sample.name in found:
                    found[sample.name] += sample.value
        return int(found["goc_batch_images_count"]), int(found["goc_batch_images_sum"])

    def stop(self) -> int:
        """Send SIGTERM, and return the exit code."""
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(120)

    def kill(self) -> None:
        """End the process at once, if it runs."""
        self._process.kill()
        self._process.wait()
        self._errors.close()

    def printed(self) -> str:
        """What the server printed on stderr."""
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace")
