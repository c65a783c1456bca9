"""Fixtures: the golden model and engine directories exported by the installed command line."""

from __future__ import annotations

import atexit
import gc
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

from goc_deploy.engines import driver
from goc_deploy.engines.ort import shared_pool_of_process
from goc_deploy.errors import EnvironmentUnsupportedError
from tests.warm_commands import TRACES, can_be_warm, run_warm

GOLDEN = Path(__file__).parent / "golden"
MNIST = Path(__file__).parents[1] / "examples" / "mnist"
BIN = Path(sys.executable).parent
GOLDEN_PLANS = {
    "none": "no_cache",
    "fora:2": "fora_50",
    "fora:2@0.5": "fora_25",
    "fora:2+gc:1.2": "fora_50_gc",
    "fora:2+steps:3,5,7,9,11,13,15,19:1.2": "fora_50_goc",
    "fora:2@0.5+gc:1.9": "fora_25_goc",
    f"l2c:{GOLDEN / 'router.pt'}@0.1": "l2c",
    f"l2c:{GOLDEN / 'router.pt'}@0.1+steps:3,5,7,9,11,13,15,19:0.8,both_branches": (
        "l2c_goc_authors"
    ),
}
# Files that take most seconds: those that start Ray or Triton, and those that export or draw a lot.
SLOW = (
    "test_ray.py",
    "test_bad_input.py",
    "test_ray_serve.py",
    "test_triton.py",
    "test_demo.py",
    "test_commands.py",
    "test_trained_latents.py",
    "test_eval.py",
    "test_run.py",
)

settings.register_profile("default", deadline=None)
settings.load_profile("default")

Command = Callable[..., "subprocess.CompletedProcess[str]"]


def command_words(name: str) -> list[str]:
    """How to run a command: the script beside this Python, or its module if none is installed."""
    script = BIN / name
    if script.exists():
        return [str(script)]
    return [
        sys.executable,
        "-m",
        "goc_deploy",
        *([] if name == "goc" else [name.removeprefix("goc-")]),
    ]


def run_installed(
    name: str, arguments: list[str], environment: dict[str, str], **more: Any
) -> subprocess.CompletedProcess[str]:
    """Run a command as a user does."""
    words = command_words(name)
    if words[0] == sys.executable:  # The module is in the tree, whatever the working directory.
        paths = [str(Path(__file__).parents[1]), environment.get("PYTHONPATH")]
        environment = {**environment, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return subprocess.run(
        [*words, *arguments], capture_output=True, text=True, timeout=300, env=environment, **more
    )


@pytest.fixture(scope="session")
def command() -> Command:
    """Run a command; its exit code is checked unless ``code`` is None.

    It runs in a process of its own, forked from one that has imported torch. With arguments of
    `subprocess.run` other than ``cwd``, it is the installed script, or the module if none is
    installed.
    """

    def run(
        name: str, *args: Any, code: int | None = 0, **more: Any
    ) -> subprocess.CompletedProcess[str]:
        words, environment = [*map(str, args)], {**os.environ, "NO_COLOR": "1"}
        installed = command_words(name)[0] != sys.executable
        if installed and more.keys() <= {"cwd"} and can_be_warm(environment):
            done = run_warm(name, words, environment, Path(more.get("cwd") or Path.cwd()), 300)
        else:
            done = run_installed(name, words, environment, **more)
        if code is not None:
            assert done.returncode == code, (
                f"exit {done.returncode}, expected {code}\n{done.stdout}\n{done.stderr}"
            )
        return done

    return run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with files that take long, so that no process works on one when all others are done."""
    items.sort(key=lambda item: SLOW.index(name) if (name := item.path.name) in SLOW else len(SLOW))


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Forget a module that was skipped when it was imported, so that importing it skips again.

    It would be half a module for those that import from it.
    """
    if report.skipped and report.nodeid.endswith(".py"):
        sys.modules.pop(report.nodeid.removesuffix(".py").replace("/", "."), None)


def pytest_configure() -> None:
    """Make the folder of traced graphs, before other processes of the run start."""
    if TRACES not in os.environ:
        os.environ[TRACES] = tempfile.mkdtemp(prefix="goc-traces-")
        atexit.register(shutil.rmtree, os.environ[TRACES], ignore_errors=True)


def pytest_collection_finish() -> None:
    """Let tests that export share traced graphs.

    And let the garbage collector skip all that importing torch made, which takes it 0.3 s a time.
    """
    if sys.modules.get("goc_deploy.exporters.lowering"):
        importlib.import_module("tests.kept_traces").keep_traces()
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test that needs a GPU before fixtures of the session export engines for it."""
    if item.get_closest_marker("gpu"):
        try:
            driver.device_capability()
        except EnvironmentUnsupportedError as reason:
            pytest.skip(str(reason))


@pytest.fixture(scope="session", autouse=True)
def threads_of_commands() -> None:
    """Make the thread pool of this process as large as that of a command without ``--threads``.

    Only the first session of a process chooses the size, and the size changes the last bits.
    """
    shared_pool_of_process(0)


@pytest.fixture
def gpu() -> None:
    """Skip, with the reason, where no GPU can be used."""
    try:
        driver.device_capability()
    except EnvironmentUnsupportedError as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="session")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "golden.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="session")
def golden_engine(tmp_path_factory: pytest.TempPathFactory, command: Command) -> Path:
    """The golden model, exported with every golden plan.

    Processes that name a folder in ``GOC_TEST_ENGINES`` share it.
    """
    directory = (
        Path(os.environ.get("GOC_TEST_ENGINES") or tmp_path_factory.mktemp("golden")) / "engine"
    )
    if directory.exists():
        return directory
    plans = [word for spec in GOLDEN_PLANS for word in ("--plan", spec)]
    command("goc-export", GOLDEN / "model.pt", "-o", directory, "--num-heads", 4, *plans)
    return directory


@pytest.fixture(scope="session")
def demo_engine(tmp_path_factory: pytest.TempPathFactory, command: Command) -> Path:
    """The shipped demo checkpoint, exported without cache, with reuse and with the gradient."""
    directory = tmp_path_factory.mktemp("demo") / "engine"
    plans = ("--plan", "none", "--plan", "fora:2", "--plan", "fora:2+gc:1.0")
    command(
        "goc-export",
        MNIST / "dit_mnist.pt",
        "-o",
        directory,
        "--num-heads",
        4,
        "--max-batch",
        50,
        *plans,
    )
    return directory


@pytest.fixture(scope="session")
def prompt_engine_small(tmp_path_factory: pytest.TempPathFactory, command: Command) -> Path:
    """The shipped PixArt with its text encoder and its VAE, with plans of five steps."""
    directory = tmp_path_factory.mktemp("prompted") / "engine"
    companions = ("--vae", MNIST / "vae", "--text-encoder", MNIST / "text_encoder")
    plans = ("--plan", "none", "--plan", "fora:2", "--steps", 5, "--max-batch", 4)
    heads = ("--num-heads", 4)
    command("goc-export", MNIST / "pixart_mnist.pt", "-o", directory, *companions, *plans, *heads)
    return directory
