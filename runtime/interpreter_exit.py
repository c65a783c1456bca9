"""The end of the interpreter while daemon threads generate.

Python ends a daemon thread that asks for its lock after the interpreter has gone. If the thread comes out of ONNX Runtime or
TensorRT just then, it is ended inside C++, which aborts the process. So the last thing before the interpreter goes is to let
launches end, and to begin no other.
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

_busy: dict[int, int] = {}  # thread -> how many calls of it are in native code, or may be soon
_exiting = False


def check_not_exiting() -> None:
    """Raise EnvironmentUnsupportedError once the interpreter exits."""
    if _exiting:
        raise EnvironmentUnsupportedError(
            "the interpreter is exiting, so nothing more is generated"
        )


@contextlib.contextmanager
def native_calls() -> Iterator[None]:
    """The body runs native code: the interpreter's exit waits for it.

    Raises:
        EnvironmentUnsupportedError: the interpreter exits already.
    """
    thread = threading.get_ident()
    before = _busy.get(thread, 0)
    _busy[thread] = before + 1  # before the check: what exits sees one or the other
    try:
        check_not_exiting()
        yield
    finally:
        _busy[thread] = before
        if not before:
            _busy.pop(thread, None)


@contextlib.contextmanager
def code_of_the_caller() -> Iterator[None]:
    """Inside `native_calls`, the body is code of whoever called, which may wait for anything: exit does not wait for it."""
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
