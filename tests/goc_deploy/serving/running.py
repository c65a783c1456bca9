"""A server in a process of its own."""

from __future__ import annotations

import base64
import io
import os
import signal
import socket
import subprocess
import time

import numpy as np
import pytest
from PIL import Image

from tests.conftest import command_words

httpx = pytest.importorskip("httpx")

TOKEN = "a-secret"
HEADERS = {"Authorization": f"Bearer {TOKEN}"}
GENERATE = "/v1/images/generations"


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


class Running:
    """A server in a process of its own."""

    def __init__(self, *arguments: object) -> None:
        self.url = f"http://127.0.0.1:{(port := free_port())}"
        words = [*command_words("goc-serve"), *map(str, arguments), "--port", str(port)]
        environment = {**os.environ, "GOC_SERVE_TOKEN": TOKEN}
        self.process = subprocess.Popen(
            words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.client = httpx.Client(base_url=self.url, headers=HEADERS, timeout=120)

    def wait(self, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.process.stderr
            try:
                if self.client.get("/health/ready").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        raise AssertionError("the server is not ready")

    def stop(self) -> tuple[int, str]:
        """Send SIGTERM; the exit code, and what was printed on both streams."""
        self.client.close()
        self.process.send_signal(signal.SIGTERM)
        out, err = self.process.communicate(timeout=120)
        return self.process.returncode, out + err


def pixels(text: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))
