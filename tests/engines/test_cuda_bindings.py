"""The calls that we make of the real cuda-bindings, on a CUDA driver of host memory.

The driver is `tests/stand_ins/libcuda`.

They load it in place of NVIDIA's, so each test here is a process of its own, which has no torch.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.stand_ins.kernels import build_library, require_nvrtc

ROOT = Path(__file__).parents[2]
STAND_INS = ROOT / "tests" / "stand_ins"
DEVICE_TESTS = (
    "tests/engines/test_cuda_device.py",
    "tests/engines/plugin/test_device_kernels.py",
    "tests/stand_ins/on_libcuda.py",
)

Run = Callable[..., str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run Python on the driver of host memory; its exit code is checked."""
    pytest.importorskip("cuda.bindings")
    folder = tmp_path_factory.mktemp("libcuda")
    build_library(folder / "libcuda.so.1", STAND_INS / "libcuda" / "driver.cpp")

    def run(*words: str, code: int = 0, **environment: str) -> str:
        paths = os.pathsep.join(filter(None, [str(folder), os.environ.get("LD_LIBRARY_PATH")]))
        done = subprocess.run(
            [sys.executable, *words],
            cwd=ROOT,
            env={**os.environ, **environment, "LD_LIBRARY_PATH": paths},
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    return run


def in_pytest(*words: str) -> list[str]:
    """The words that run tests there."""
    return [
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "tests.stand_ins.libcuda_plugin",
        *words,
    ]


def test_the_device_works_on_the_real_bindings_and_each_of_our_calls_is_among_them(
    run: Run, tmp_path: Path
) -> None:
    require_nvrtc()
    made = tmp_path / "calls"
    output = run(*in_pytest(*DEVICE_TESTS), STUB_CALLS=str(made))
    assert "skipped" not in output
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "engines").glob("**/*.py")]
    ours = {name for source in sources for name in re.findall(r"\.(cu[A-Z]\w+)", source)}
    assert len(ours) > 30
    assert ours <= {name.removesuffix("WithFlags") for name in made.read_text().split()}


def test_sessions_of_onnx_runtime_work_on_the_real_bindings(run: Run, golden_engine: Path) -> None:
    require_nvrtc()
    words = in_pytest(
        "tests/runtime/test_gpu.py",
        "-k",
        "(test_onnx_runtime or sessions_of_onnx_runtime) and not bf16",
    )
    output = run(*words, GOC_TEST_ENGINES=str(golden_engine.parent))
    assert "skipped" not in output


def test_a_driver_that_is_older_than_the_bindings_is_refused(run: Run) -> None:
    refused = run(
        "-c",
        "from goc_deploy.engines.cuda import cuda_device; cuda_device()",
        code=1,
        STUB_CUDA_VERSION="12080",
    )
    assert re.search(
        r"EnvironmentUnsupportedError: .*driver is for CUDA 12\.8, .* for CUDA 13.*; update the "
        r"driver",
        refused,
    )
