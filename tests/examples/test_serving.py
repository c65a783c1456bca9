"""Each example of a host draws the picture of the library, and refuses a class that is not there.

Hosts that are not installed beside the tests are taken from ``out/hosts``, or from the environment
that ``GOC_HOSTS_ENVIRONMENT`` names (``tests.serving_hosts.environment`` makes one).
"""

from __future__ import annotations

import base64
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import goc_deploy
from tests.drawn import digits_drawn

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "serving"
ENVIRONMENT = Path(os.environ.get("GOC_HOSTS_ENVIRONMENT") or ROOT / "out" / "hosts")


def python_with(*modules: str) -> str:
    """A Python that has these modules; without one the test is skipped."""
    for python in (sys.executable, str(ENVIRONMENT / "bin" / "python")):
        words = [
            python,
            "-c",
            "import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, sys.argv[1:])))",
            *modules,
        ]
        if Path(python).exists() and subprocess.run(words).returncode == 0:
            return python
    pytest.skip(
        f"{' and '.join(modules)} are not installed here or in {ENVIRONMENT}; make it with: "
        "python -m tests.serving_hosts.environment others out/hosts"
    )


@pytest.fixture(scope="module")
def expected(demo_engine: Path) -> np.ndarray:
    """The picture of class 7 and seed 5, (28, 28)."""
    with goc_deploy.load(demo_engine, backend="onnxruntime") as pipe:
        images = pipe.generate([7], seed=5).images
    assert images is not None
    return images[0, :, :, 0]


@contextmanager
def serving(engine: Path, *words: object, ready: str) -> Iterator[str]:
    """Run a server on a port of its own, for {port} in its words; yield its address."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = str(one.getsockname()[1])
    environment = {
        **os.environ,
        "GOC_ENGINE": str(engine),
        "PORT": port,
        "PYTHONPATH": str(ROOT),
        "NO_COLOR": "1",
        "BENTOML_DO_NOT_TRACK": "True",
    }
    with tempfile.TemporaryFile("w+") as log, tempfile.TemporaryDirectory() as home:
        process = subprocess.Popen(
            [str(word).replace("{port}", port) for word in words],
            env={**environment, "BENTOML_HOME": home},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            deadline = time.monotonic() + 180
            while status(url + ready) != 200:
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise AssertionError(f"exit {process.returncode}\n{log.read()}")
                time.sleep(0.2)
            yield url
            process.send_signal(signal.SIGTERM)
            process.wait(60)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # LitServe leaves workers behind
            process.wait()


def status(url: str, body: dict[str, int] | None = None) -> int:
    try:
        answer(url, body)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0
    return 200


def answer(url: str, body: dict[str, int] | None = None) -> bytes:
    request = urllib.request.Request(url)
    if body is not None:
        request.data = json.dumps(body).encode()
        request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=60) as response:
        return response.read()


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


def test_fastapi_by_hand(demo_engine: Path, expected: np.ndarray) -> None:
    python = python_with("fastapi", "uvicorn")
    words = (python, "-m", "uvicorn", "--app-dir", EXAMPLES, "--port", "{port}", "fastapi_app:app")
    with serving(demo_engine, *words, ready="/ready") as url:
        np.testing.assert_array_equal(pixels(answer(f"{url}/images/7?seed=5")), expected)
        assert status(f"{url}/images/10") == 400


def test_gunicorn_that_loads_the_application_before_it_forks(demo_engine: Path) -> None:
    python = python_with("gunicorn")
    words = (python, "-m", "gunicorn", "--preload", "--chdir", EXAMPLES, "--bind")
    app = ("127.0.0.1:{port}", "-c", EXAMPLES / "gunicorn_app.py", "gunicorn_app:app")
    with serving(demo_engine, *words, *app, ready="/?label=0") as url:
        found = pixels(answer(f"{url}/?label=7&seed=5"))
        cores = max(1, (os.cpu_count() or 1) // 2)  # of each of its two processes
        (expected,) = digits_drawn(demo_engine, 7, (5,), threads=cores)
        np.testing.assert_array_equal(found, expected)
        assert status(f"{url}/?label=10") == 400


@pytest.mark.slow
def test_litserve(demo_engine: Path, expected: np.ndarray) -> None:
    python = python_with("litserve")
    with serving(demo_engine, python, EXAMPLES / "litserve_app.py", ready="/health") as url:
        png = json.loads(answer(f"{url}/predict", {"label": 7, "seed": 5}))["png"]
        np.testing.assert_array_equal(pixels(base64.b64decode(png)), expected)
        assert status(f"{url}/predict", {"label": 10}) == 400


@pytest.mark.slow
def test_bentoml(demo_engine: Path, expected: np.ndarray) -> None:
    python = python_with("bentoml")
    words = (python, "-m", "bentoml", "serve", "bentoml_app:Pictures", "--port", "{port}")
    folder = ("--working-dir", EXAMPLES)
    with serving(demo_engine, *words, *folder, ready="/readyz") as url:
        png = answer(f"{url}/draw", {"label": 7, "seed": 5})
        np.testing.assert_array_equal(pixels(png), expected)
        assert status(f"{url}/draw", {"label": 10}) == 400


def test_the_commands_of_the_readme_start_files_that_are_there() -> None:
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\b(\w+_app)\b", text))
    assert named == {path.stem for path in EXAMPLES.glob("*.py")}
