"""Kernels that TensorRT for RTX compiled on this GPU, saved for the next process.

They are in the engine directory. They are executable code, so only the bytes that the manifest
lists are loaded. TensorRT itself checks that they fit the GPU and the versions, and compiles what
is missing.
"""

from __future__ import annotations

import logging
import threading
from hashlib import sha256
from typing import Any

from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.engines.tensorrt.caches import keep_cache, read_cache
from goc_deploy.errors import GocError

logger = logging.getLogger(__name__)


class KernelCache:
    """The kernels of all engines of a target that run on one kind of GPU.

    Args:
        directory: the engine directory, from which the kernels are read immediately.
        path: path of the cache, from `goc_deploy.engines.tensorrt.caches.cache_path`.
    """

    def __init__(self, directory: EngineDir, path: str) -> None:
        self._directory, self.path = directory.path, path
        self._lock = threading.Lock()
        self._cache: Any = None
        self._stored = b""  # content that was read, until TensorRT takes it
        try:
            self._stored = read_cache(directory, path)
        except GocError as reason:
            logger.warning("compiled kernels are not loaded: %s", reason)
        self._kept = b""  # digest of the undamaged content in the directory
        self._has_grown = False

    def attach(self, config: Any) -> None:
        """Make contexts of a runtime configuration use the kernels, and collect new ones."""
        with self._lock:
            if self._cache is None:
                self._cache = config.create_runtime_cache()
                self._load()
            if self._cache is None or not config.set_runtime_cache(self._cache):
                logger.warning(
                    "TensorRT takes no cache for compiled kernels; every process compiles them"
                )
                return
            self._has_grown = True

    def _load(self) -> None:
        content, self._stored = self._stored, b""
        if not content or self._cache is None:
            return
        if self._cache.deserialize(content):
            self._kept = sha256(content).digest()
        else:
            logger.warning(
                "compiled kernels are not loaded: TensorRT does not take %s",
                self._directory / self.path,
            )

    def keep(self) -> None:
        """Write the file of kernels, then the manifest that lists it; without new ones do nothing.

        If the directory cannot be written, the log states that, and the next process compiles
        again.
        """
        with self._lock:
            if not self._has_grown:
                return
            self._has_grown = False
            memory = self._cache.serialize()
            content = b"" if memory is None else bytes(memoryview(memory))
            digest = sha256(content).digest()
            if not content or digest == self._kept:
                return
            try:
                keep_cache(self._directory, self.path, content)
                self._kept = digest
            except GocError as reason:
                logger.info("compiled kernels are not kept: %s", reason)
