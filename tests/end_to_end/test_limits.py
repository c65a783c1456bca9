"""If memory or open files run out, the engine is not called corrupt.

Otherwise a user would delete a good one.
"""

from __future__ import annotations

import subprocess
import sys
from itertools import count
from pathlib import Path

import pytest

from tests.conftest import command_words

EVERYTHING = (
    "import goc_deploy.cli.run, goc_deploy.runtime.loading, goc_deploy.runtime.picture_files\n"
    "import goc_deploy.engines.ort, goc_deploy.api.series\n"
    "print(next(l.split()[1] for l in open('/proc/self/status') if l.startswith('VmPeak')))"
)
STEP_KB = 32 * 1024
OUT_OF_RESOURCES = 7
ENDED_BY_C = "cannot allocate memory for thread-local data: ABORT"


def run_limited(limit: str, engine: Path, output: Path) -> subprocess.CompletedProcess[str]:
    """goc-run under a limit of the shell, such as ``-n 20``."""
    words = [*command_words("goc-run"), engine, "--labels", "1", "--latents-output", output]
    options = ["--backend", "onnxruntime", "--threads", "1", "--batch-size", "1"]
    return subprocess.run(
        ["bash", "-c", f'ulimit {limit}; exec "$@"', "bash", *map(str, words), *options],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def assert_short_of_resources(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == OUT_OF_RESOURCES, done.stderr
    assert "export again" not in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("files", [10, 16])
def test_too_few_open_files_are_named(golden_engine: Path, tmp_path: Path, files: int) -> None:
    done = run_limited(f"-n {files}", golden_engine, tmp_path / "x.npy")
    assert_short_of_resources(done)
    assert "open files" in done.stderr
    assert not (tmp_path / "x.npy").exists()


def test_too_little_memory_is_named_until_it_suffices(golden_engine: Path, tmp_path: Path) -> None:
    """From what the imports take, in steps: memory runs out at another place each time.

    Native libraries may end the process, as they do not check every allocation.
    """
    measured = subprocess.run(
        [sys.executable, "-c", EVERYTHING], capture_output=True, text=True, check=True, timeout=300
    )
    named = 0
    for step in count():
        limit = int(measured.stdout) + step * STEP_KB
        done = run_limited(f"-v {limit}", golden_engine, tmp_path / "x.npy")
        if done.returncode == 0:
            break
        if done.returncode > 0 and ENDED_BY_C not in done.stderr:
            assert_short_of_resources(done)
            named += 1
        assert not (tmp_path / "x.npy").exists()
    assert named
    assert (tmp_path / "x.npy").exists()
