"""The exit of the interpreter while daemon threads generate images.

Python terminates a daemon thread that requests the interpreter's lock after the exit. If the thread
is returning from ONNX Runtime or TensorRT, it is terminated inside C++, which aborts the process.
Therefore the exit waits for running launches, and new launches are refused.
"""

from __future__ import annotations

import atexit
import contextlib
import threading
import time
from collections.abc import Iterator

from goc_deploy.errors import EnvironmentUnsupportedError

MAX_WAIT_SECONDS = 60.0
POLL_SECONDS = 0.002

_busy: dict[int, int] = {}  # thread -> number of its calls that are or may soon be in native code
_exiting = False


def check_not_exiting() -> None:
    """Raise an error if the interpreter is exiting.

    Raises:
        EnvironmentUnsupportedError: the interpreter is exiting.
    """
    if _exiting:
        raise EnvironmentUnsupportedError(
            "the interpreter is exiting, so nothing more is generated"
        )


@contextlib.contextmanager
def native_calls() -> Iterator[None]:
    """Make the exit of the interpreter wait for the body, which runs native code.

    Raises:
        EnvironmentUnsupportedError: the interpreter is exiting.
    """
    thread = threading.get_ident()
    before = _busy.get(thread, 0)
    _busy[thread] = (
        before + 1
    )  # before the check, so that the exit sees the call, or the check fails
    try:
        check_not_exiting()
        yield
    finally:
        _busy[thread] = before
        if not before:
            _busy.pop(thread, None)


@contextlib.contextmanager
def code_of_the_caller() -> Iterator[None]:
    """Inside `native_calls`, let the exit not wait for the body, which is code of the caller."""
    thread = threading.get_ident()
    before = _busy.pop(thread, 0)
    try:
        yield
    finally:
        _busy[thread] = before
    check_not_exiting()


@atexit.register
def _wait_for_launches() -> None:
    global _exiting
    _exiting = True
    this, deadline = threading.get_ident(), time.monotonic() + MAX_WAIT_SECONDS
    while time.monotonic() < deadline:
        alive = {thread.ident for thread in threading.enumerate()}
        if not any(
            count and thread != this and thread in alive for thread, count in list(_busy.items())
        ):
            return
        time.sleep(POLL_SECONDS)
