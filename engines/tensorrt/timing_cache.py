"""Timings of tactics that TensorRT measured on this GPU, kept in the engine directory for later builds.

Blocks of a model are alike, so TensorRT times the layers of one and finds those of all others. TensorRT for RTX times
nothing when it builds, and a timing cache would make it ask for a GPU.
"""

from __future__ import annotations

import logging
from typing import Any

from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.engines.tensorrt.caches import keep_cache, read_cache
from goc_deploy.errors import GocError

logger = logging.getLogger(__name__)


class TimingCache:
    """The timings of a target, for one kind of GPU. For the process that holds the lock of the target.

    Args:
        directory: the engine directory.
        path: where they lie in it, as `goc_deploy.engines.tensorrt.caches.cache_path` names it.
    """

    def __init__(self, directory: EngineDir, path: str) -> None:
        self._directory, self._path = directory.path, path
        self.content = b""
        try:
            self.content = read_cache(directory, path)
        except GocError as reason:
            logger.warning("timings are not used: %s", reason)

    def refused(self) -> None:
        """Tell that TensorRT does not take them: they are of another version or GPU. The next `keep` replaces them."""
        logger.warning(
            "timings are not used: TensorRT does not take %s", self._directory / self._path
        )

    def keep(self, content: bytes) -> None:
        """Write what a build made of the timings.

        Raises:
            ConflictError, ResourceError: the directory cannot be written.
        """
        if content and content != self.content:
            keep_cache(self._directory, self._path, content)
            self.content = content


def use_timings(config: Any, content: bytes) -> bool:
    """Add timings of earlier builds to the cache that Polygraphy gave a configuration; whether TensorRT takes them."""
    if not content:
        return True
    earlier = config.create_timing_cache(content)
    return earlier is not None and bool(
        config.get_timing_cache().combine(earlier, ignore_mismatch=False)
    )


def timings_of(config: Any) -> bytes:
    """All timings that a configuration has after a build."""
    memory = config.get_timing_cache().serialize()
    return b"" if memory is None else bytes(memoryview(memory))
