"""Scratch memory: device memory that TensorRT engines need only while they run.

A session has one allocation, as large as its largest engine needs, because its engines run one
after the other. TensorRT has three names for it: the *workspace* pool limits it during a build,
the builder logs it as *activation memory*, and a loaded engine has it as *device memory*.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from goc_deploy.protocols import Buffer

_LOGGED = re.compile(r"Total Activation Memory: (\d+) bytes")


def limit_options(trt: Any, limit: int) -> dict[str, Any]:
    """Arguments of Polygraphy's ``create_config`` that limit the scratch memory of an engine.

    Args:
        trt: the module of the library.
        limit: most bytes; 0 is no limit.
    """
    return {"memory_pool_limits": {trt.MemoryPoolType.WORKSPACE: limit}} if limit else {}


def logged_bytes(messages: Iterable[str]) -> int | None:
    """Scratch memory at the largest shapes, read in the log of a build; None if it is not there."""
    return max((int(m[1]) for text in messages if (m := _LOGGED.search(text))), default=None)


def needed_bytes(engines: Iterable[Any]) -> int:
    """Scratch memory of the largest of these loaded engines, at its largest shapes."""
    return max((int(engine.device_memory_size_v2) for engine in engines), default=0)


def use_scratch(context: Any, scratch: Buffer | None) -> None:
    """Let an execution context run in the scratch memory of its session, if it has any."""
    if scratch is not None:
        context.set_device_memory(scratch.pointer, scratch.nbytes)
