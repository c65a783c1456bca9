"""The wheel runs engines in an environment that has its run-time dependencies and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from goc_deploy.version import __version__
from tests.conftest import Command
from tests.packaging.test_pyproject import PROJECT, ROOT

pytestmark = pytest.mark.slow

FOLDERS = ("goc_deploy", "exporters", "engines", "runtime")
FILES = ("pyproject.toml", "README.md", "LICENSE")
FOR_EXPORTING_ONLY = (
    "torch",
    "onnx",
    "onnxscript",
    "onnx_ir",
    "tensorrt",
    "tensorrt_rtx",
)


def checked(*words: Any, **more: Any) -> str:
    """What a program prints; its errors are shown when it fails."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [str(word) for word in words],
        capture_output=True,
        text=True,
        timeout=600,
        env=clean,
        **more,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("source")  # setuptools writes beside what it packs
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, symlinks=True)
    for name in FILES:
        shutil.copy(ROOT / name, source)
    checked(
        sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", source / "wheels", source
    )
    (path,) = (source / "wheels").iterdir()
    return path


@pytest.fixture(scope="module")
def empty_environment(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Path:
    """The folder of programs of a virtual environment with the wheel and what it requires."""
    folder = tmp_path_factory.mktemp("empty") / "venv"
    venv.create(folder, symlinks=True)
    pip = (sys.executable, "-m", "pip", "--python", folder / "bin" / "python")
    checked(*pip, "install", "--constraint", ROOT / "constraints.txt", wheel)
    return folder / "bin"


def test_the_wheel_holds_what_is_not_python(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    kernels = {
        f"goc_deploy/engines/plugin/{path.name}"
        for path in (ROOT / "engines" / "plugin").glob("*.cu")
    }
    assert kernels
    pages = {"goc_deploy/evaluation/page.css", "goc_deploy/serving/page.html"}
    assert {*kernels, *pages, "goc_deploy/py.typed"} <= names


@pytest.mark.parametrize("name", PROJECT["project"]["scripts"])
def test_every_command_starts(empty_environment: Path, tmp_path: Path, name: str) -> None:
    assert checked(empty_environment / name, "--version", cwd=tmp_path) == f"{name} {__version__}\n"


def test_what_exports_is_absent(empty_environment: Path, tmp_path: Path) -> None:
    code = (
        "import goc_deploy, importlib.util; "
        f"print([n for n in {FOR_EXPORTING_ONLY} if importlib.util.find_spec(n)])"
    )
    assert checked(empty_environment / "python", "-c", code, cwd=tmp_path) == "[]\n"


def test_an_engine_gives_the_same_latents_as_here(
    empty_environment: Path, golden_engine: Path, command: Command, tmp_path: Path
) -> None:
    words = (
        "goc-run",
        golden_engine,
        "--labels",
        "1,7",
        "--backend",
        "onnxruntime",
        "--latents-output",
    )
    command(*words, tmp_path / "here.npy")
    checked(empty_environment / words[0], *words[1:], tmp_path / "there.npy", cwd=tmp_path)
    np.testing.assert_array_equal(np.load(tmp_path / "here.npy"), np.load(tmp_path / "there.npy"))
