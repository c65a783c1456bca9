"""Commands in processes that are forked from one that has imported torch already.

Importing it takes longer than most commands of the tests.
"""

from __future__ import annotations

import functools
import importlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from multiprocessing import forkserver
from pathlib import Path

ROOT = Path(__file__).parents[1]
STARTED_WITH = dict(os.environ)  # before any test changes a variable for itself
TRACES = "GOC_TEST_TRACES"  # names the folder of the run for tests.kept_traces
READ_AT_START = ("LD_", "MALLOC_", "MKL_", "OMP_", "OPENBLAS_", "PYTHON")


def can_be_warm(environment: Mapping[str, str]) -> bool:
    """Whether an environment has the same variables that are read when a process starts."""
    return _read_at_start(environment) == _read_at_start(STARTED_WITH)


def run_warm(
    name: str,
    arguments: list[str],
    environment: Mapping[str, str],
    cwd: Path,
    timeout: float,
    streams: tuple[str, str] = ("stdout", "stderr"),
) -> subprocess.CompletedProcess[str]:
    """Run a command as `subprocess.run` does.

    Args:
        name: of the command.
        arguments: its arguments.
        environment: its variables.
        cwd: where it runs.
        timeout: in seconds.
        streams: names of the files of its outputs. Equal names keep the order of their lines; both
            outputs of the result then have all of them.

    Raises:
        TimeoutExpired: the command took too long, and was killed.
    """
    _start()
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, stream) for stream in streams]
        process = multiprocessing.get_context("forkserver").Process(
            target=_run, args=(name, arguments, dict(environment), cwd, files)
        )
        process.start()
        process.join(timeout)
        late = process.is_alive()
        if late:
            process.kill()
            process.join()
        code = process.exitcode
        process.close()
        words = [name, *arguments]
        if late:
            raise subprocess.TimeoutExpired(words, timeout)
        assert code is not None
        printed = [file.read_text() if file.exists() else "" for file in files]
        return subprocess.CompletedProcess(words, code, *printed)


@functools.cache
def _start() -> None:
    """Start the process that is forked, with the variables of ``STARTED_WITH``."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(["tests.warm_torch"])
    here, paths = dict(os.environ), [str(ROOT), STARTED_WITH.get("PYTHONPATH")]
    os.environ.clear()
    os.environ.update({**STARTED_WITH, "PYTHONPATH": os.pathsep.join(filter(None, paths))})
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(here)


def _read_at_start(environment: Mapping[str, str]) -> dict[str, str]:
    return {key: environment[key] for key in environment if key.startswith(READ_AT_START)}


def _run(
    name: str, arguments: list[str], environment: dict[str, str], cwd: Path, files: list[Path]
) -> None:
    for number, file in zip((1, 2), files, strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = [name, *arguments]
    module = "goc" if name == "goc" else name.removeprefix("goc-")
    sys.exit(importlib.import_module(f"goc_deploy.cli.{module}").main())
