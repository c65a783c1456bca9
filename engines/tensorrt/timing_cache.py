"""Timings of tactics that TensorRT measured on this GPU, saved for later builds.

They are in the engine directory. The blocks of a model are alike, so TensorRT times the layers of
one block and reuses the timings for all others. TensorRT for RTX times nothing during a build, and
a timing cache would make it require a GPU.
"""

from __future__ import annotations

import logging
from typing import Any

from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.engines.tensorrt.caches import keep_cache, read_cache
from goc_deploy.errors import GocError

logger = logging.getLogger(__name__)


class TimingCache:
    """The timings of a target on one kind of GPU. Its user must hold the lock of the target.

    Args:
        directory: the engine directory.
        path: path of the cache, from `goc_deploy.engines.tensorrt.caches.cache_path`.
    """

    def __init__(self, directory: EngineDir, path: str) -> None:
        self._directory, self._path = directory.path, path
        self.content = b""
        try:
            self.content = read_cache(directory, path)
        except GocError as reason:
            logger.warning("timings are not used: %s", reason)

    def refused(self) -> None:
        """Note that TensorRT refuses these timings; the next `keep` replaces them."""
        logger.warning(
            "timings are not used: TensorRT does not take %s", self._directory / self._path
        )

    def keep(self, content: bytes) -> None:
        """Write the timings after a build.

        Raises:
            ConflictError, ResourceError: the directory cannot be written.
        """
        if content and content != self.content:
            keep_cache(self._directory, self._path, content)
            self.content = content


def use_timings(config: Any, content: bytes) -> bool:
    """Add timings of earlier builds to a configuration; return whether TensorRT takes them."""
    if not content:
        return True
    earlier = config.create_timing_cache(content)
    return earlier is not None and bool(
        config.get_timing_cache().combine(earlier, ignore_mismatch=False)
    )


def timings_of(config: Any) -> bytes:
    """Return all timings of a configuration after a build."""
    memory = config.get_timing_cache().serialize()
    return b"" if memory is None else bytes(memoryview(memory))
