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
import contextlib, io, sys
heavy = {"prometheus_client", "opentelemetry", "fastapi", "uvicorn", "starlette", "pydantic"}
heavy |= {"httpx", "openai", "ray", "tritonclient", "torch", "onnx"}
sys.modules.update(dict.fromkeys(heavy))  # as if they were not installed
import goc_deploy, goc_deploy.serving, goc_deploy.sharded.run
from goc_deploy.cli.run import main
engine, output = sys.argv[1:]
words = "--labels 1 --plan fora:2 --backend onnxruntime --latents-output".split()
with contextlib.redirect_stderr(io.StringIO()):  # the notes of the command
    assert main([engine, *words, output]) == 0
assert not any(sys.modules[name] for name in heavy)
"""


def run(script: str, *arguments: object) -> None:
    """Run a script, which prints no error."""
    words = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", script]
    done = subprocess.run(
        [*words, *map(str, arguments)], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_fork_is_told_to_start_its_own_service(golden_engine: Path) -> None:
    run(FORK, golden_engine)


def test_the_interpreter_ends_cleanly_while_requests_run(golden_engine: Path) -> None:
    run(EXIT, golden_engine)


def test_importing_and_goc_run_need_no_optional_package(
    golden_engine: Path, tmp_path: Path
) -> None:
    run(LIGHT, golden_engine, tmp_path / "latents.npy")
    assert (tmp_path / "latents.npy").exists()
