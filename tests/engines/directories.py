"""Engine directories that tests change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from goc_deploy.engine_dir.manifest import MANIFEST_NAME
from goc_deploy.engine_dir.manifest_file import manifest_to_json
from goc_deploy.engine_dir.reading import file_entry, read_manifest


def with_graph(directory: Path, path: str, content: bytes, **changes: Any) -> None:
    """Write a graph, and a manifest that lists it, as if it had been exported so."""
    (directory / path).write_bytes(content)
    manifest = read_manifest(directory)
    files = [file for file in manifest.files if file.path != path]
    manifest = replace(manifest, files=(*files, file_entry(directory, path)), **changes)
    (directory / MANIFEST_NAME).write_text(manifest_to_json(manifest))
