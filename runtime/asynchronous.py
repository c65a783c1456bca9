"""Calls in a thread for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from goc_deploy.cancellation import CancelToken, call_limits

Returned = TypeVar("Returned")


async def in_a_thread(
    call: Callable[[float | None, CancelToken], Returned],
    deadline: float | None,
    cancel: CancelToken | None,
) -> Returned:
    """Run a call in a thread of asyncio's executor, and cancel it with the task.

    Args:
        call: called with the seconds that are left and with a token.
        deadline: seconds from now, with the time that the call waits for a thread; or None.
        cancel: a token that cancels the call too, or None.
    """
    limits = call_limits(deadline, cancel)
    token = CancelToken() if cancel is None else CancelToken(cancel)

    def run() -> Returned:
        return call(None if limits is None else limits.remaining, token)

    try:
        return await asyncio.to_thread(run)
    except asyncio.CancelledError:
        token.cancel()
        raise
