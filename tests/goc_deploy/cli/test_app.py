"""How a command ends: after signals, on closed streams, and if memory ran out."""

from __future__ import annotations

import signal
import subprocess
import sys

import click
import pytest

from goc_deploy.cli.app import run_command
from tests.conftest import BIN

INTERRUPTED_IN_A_WEAK_REFERENCE = """
import os, signal, sys, weakref, click
from goc_deploy.cli.app import run_command
from goc_deploy.cli.progress import progress_bar

class Thing: ...

# A shell makes its background jobs ignore the signal.
signal.signal(signal.SIGINT, signal.default_int_handler)

@click.command()
def command():
    thing = Thing()
    reference = weakref.ref(thing, lambda _: os.kill(os.getpid(), {number}))
    with progress_bar() as progress:
        del thing
        progress("working", 1, 2)
        print("went on")

sys.exit(run_command(command, []))
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_that_python_swallows_still_ends_the_command_in_silence(
    number: int, code: int
) -> None:
    script = INTERRUPTED_IN_A_WEAK_REFERENCE.format(number=int(number))
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert "Traceback" not in done.stderr


def test_other_errors_that_python_swallows_are_reported() -> None:
    script = INTERRUPTED_IN_A_WEAK_REFERENCE.replace("os.kill(os.getpid(), {number})", "1 / 0")
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    assert "ZeroDivisionError" in done.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_that_native_code_turned_into_an_error_is_an_interruption(
    number: int, code: int
) -> None:
    script = INTERRUPTED_IN_A_WEAK_REFERENCE.format(number=int(number)).replace(
        'progress("working", 1, 2)', "1 / 0"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert "bug" not in done.stderr


@pytest.mark.parametrize(
    ("redirection", "code"),
    [(">&-", 0), (">/dev/full", 7), ("2>/dev/full", 0), ("2>&-", 0), (">&- 2>&-", 0)],
)
def test_streams_that_are_full_or_closed_end_a_command_quietly(redirection: str, code: int) -> None:
    words = f"{BIN / 'goc-plan'} --help {redirection}"
    done = subprocess.run(["bash", "-c", words], capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    assert "bug" not in done.stderr
    assert "Traceback" not in done.stderr
    failing = f"{BIN / 'goc-plan'} /nowhere --list {redirection}"
    assert subprocess.run(["bash", "-c", failing], capture_output=True, timeout=60).returncode == 4


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ImportError("x.so: failed to map segment from shared object"), 7),
        (ImportError("x.so: cannot map zero-fill pages"), 7),
        (ImportError("x.so: cannot open shared object file: Too many open files"), 7),
        (ImportError("failed to map segment from shared object: Cannot allocate memory"), 7),
        (ImportError("failed to map segment from shared object: Operation not permitted"), 1),
        (ImportError("cannot import name 'load' from 'goc_deploy'"), 1),
        (TypeError("Couldn't build proto file into descriptor pool: out of memory"), 7),
        (TypeError("an integer is required"), 1),
        (RuntimeError("can't start new thread"), 7),
        (MemoryError(), 7),
    ],
)
def test_an_error_of_any_class_whose_text_names_what_ran_out_is_no_bug(
    error: Exception, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    @click.command()
    def command() -> None:
        raise error

    assert run_command(command, []) == code
    assert ("a bug" in capsys.readouterr().err) == (code == 1)
