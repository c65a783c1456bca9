"""One digest for many files of an engine directory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from goc_deploy.engine_dir.manifest import FileEntry


def fingerprint(files: Iterable[FileEntry]) -> str:
    """SHA-256 of the paths and digests of files, in hexadecimal; their order does not matter."""
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda file: file.path):
        digest.update(f"{file.path}\0{file.sha256}\n".encode())
    return digest.hexdigest()
