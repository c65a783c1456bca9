"""A service and its process: forks, the end of the interpreter, and what is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FORK = """
import os, sys
from goc_deploy.errors import EnvironmentUnsupportedError
from goc_deploy.serving import HostedModel, ImageRequest, Service
model = HostedModel(sys.argv[1], ("fora:2",), backend="onnxruntime")
service = Service({"m": model})
service.start()
child = os.fork()
if not child:
    try:
        service.generate(ImageRequest("m", labels=[1]))
    except EnvironmentUnsupportedError as error:
        service.close()
        os._exit(3 if "before a fork" in str(error) and not service.ready() else 4)
    os._exit(5)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 3, status
service.generate(ImageRequest("m", labels=[1]))
service.close()
"""

EXIT = """
import sys
from goc_deploy.serving import HostedModel, ImageRequest, Service
model = HostedModel(sys.argv[1], ("fora:2",), backend="onnxruntime")
service = Service({"m": model})
service.start()
futures = [service.submit(ImageRequest("m", labels=[1] * 8)) for _ in range(4)]
"""

LIGHT = """
import sys
import goc_deploy, goc_deploy.serving, goc_deploy.cli.run, goc_deploy.sharded.run
heavy = {"prometheus_client", "opentelemetry", "fastapi", "uvicorn", "starlette", "ray"}
heavy |= {"torch", "onnx"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""


def run(script: str, *arguments: object) -> None:
    words = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", script]
    done = subprocess.run(
        [*words, *map(str, arguments)], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_fork_is_told_to_start_its_own_service(golden_engine: Path) -> None:
    run(FORK, golden_engine)


def test_the_interpreter_ends_cleanly_while_requests_run(golden_engine: Path) -> None:
    run(EXIT, golden_engine)


def test_importing_needs_no_optional_package() -> None:
    run(LIGHT)
