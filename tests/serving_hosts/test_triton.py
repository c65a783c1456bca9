"""A real tritonserver: starts the checks of ``triton_checks.py`` in the environment of the server.

``environment.py`` makes that environment; without it the test is skipped.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.conftest import Command

ROOT = Path(__file__).parents[2]
ENVIRONMENT = Path(os.environ.get("GOC_TRITON_ENVIRONMENT") or ROOT / "out" / "triton")
PYTHON = ENVIRONMENT / "bin" / "python"


@pytest.mark.slow
def test_a_real_server_draws_batches_and_refuses_what_is_wrong(
    demo_engine: Path, prompt_engine_small: Path, command: Command, tmp_path: Path
) -> None:
    if not PYTHON.exists():
        pytest.skip(
            f"{ENVIRONMENT} has no tritonserver; make it with: "
            "python -m tests.serving_hosts.environment triton out/triton"
        )
    repository = tmp_path / "models"
    settings = ("--max-delay-ms", 100, "--threads", 1, "--backend", "onnxruntime")
    for name, engine, queued in (("digits", demo_engine, 8), ("prompts", prompt_engine_small, 64)):
        (tmp_path / name).symlink_to(engine)
        words = ("--triton-repository", repository, "--queued-images", queued, *settings)
        command("goc-serve", tmp_path / name, *words)
    words = [
        PYTHON,
        "-m",
        "pytest",
        "--noconftest",
        "-p",
        "no:cacheprovider",
        "-q",
        "-o",
        "addopts=",
    ]
    done = subprocess.run(
        [*words, "-o", "filterwarnings=", ROOT / "tests" / "serving_hosts" / "triton_checks.py"],
        env={**os.environ, "GOC_TRITON_REPOSITORY": str(repository), "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
