"""Kernels that TensorRT for RTX compiled on this GPU, kept in the engine directory for the next process.

They are executable code, so what is loaded is what the manifest lists, byte for byte. TensorRT itself checks that they fit
the GPU and the versions, and compiles what is missing.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from goc_deploy.engine_keys import Target
from goc_deploy.errors import GocError
from goc_deploy.manifest import MANIFEST_NAME, manifest_to_json
from goc_deploy.publish import directory_lock, disk_errors, file_entry, read_manifest, read_verified, replacing

logger = logging.getLogger(__name__)


class KernelCache:
    """The kernels of all engines of a target that run on one kind of GPU.

    Args:
        directory: the engine directory.
        target: of the engines.
        capability: of the GPU, such as ``8.9``.
    """

    def __init__(self, directory: Path, target: Target, capability: str) -> None:
        self._directory, self.path = directory, f"{target.folder}/kernels-sm{capability.replace('.', '')}.cache"
        self._lock = threading.Lock()
        self._cache: Any = None
        self._kept = b""  # digest of what lies in the directory, as far as it is sound
        self._has_grown = False

    def attach(self, config: Any) -> None:
        """Let contexts that are made with a runtime configuration use the kernels, and add theirs."""
        with self._lock:
            if self._cache is None:
                self._cache = config.create_runtime_cache()
                self._load()
            if self._cache is None or not config.set_runtime_cache(self._cache):
                logger.warning("TensorRT takes no cache for compiled kernels; every process compiles them")
                return
            self._has_grown = True

    def _load(self) -> None:
        try:
            listed = {file.path: file for file in read_manifest(self._directory).files}
            if self._cache is None or self.path not in listed:
                return
            content = bytes(read_verified(self._directory, listed[self.path]))
        except GocError as reason:
            logger.warning("compiled kernels are not loaded: %s", reason)
            return
        if self._cache.deserialize(content):
            self._kept = sha256(content).digest()
        else:
            logger.warning("compiled kernels are not loaded: TensorRT does not take %s", self._directory / self.path)

    def keep(self) -> None:
        """Write the kernels, file first, then the manifest that lists it; nothing where there are no new ones.

        A directory that cannot be written keeps none: the log says so, and the next process compiles again.
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
                self._write(content)
                self._kept = digest
            except GocError as reason:
                logger.info("compiled kernels are not kept: %s", reason)

    def _write(self, content: bytes) -> None:
        directory, path = self._directory, self.path
        with directory_lock(directory), disk_errors(f"keeping compiled kernels in {directory}"):
            manifest = read_manifest(directory)
            (directory / path).parent.mkdir(parents=True, exist_ok=True)
            with replacing(directory / path) as temporary:
                temporary.write_bytes(content)
            others = [file for file in manifest.files if file.path != path]
            files = tuple(sorted([*others, file_entry(directory, path)], key=lambda file: file.path))
            with replacing(directory / MANIFEST_NAME) as temporary:
                temporary.write_text(manifest_to_json(replace(manifest, files=files)), encoding="utf-8")
