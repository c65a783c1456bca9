"""Counts how often the manifest of an engine directory is read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from goc_deploy.engine_dir.manifest import MANIFEST_NAME


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The paths of manifests that are opened from now on; some are relative to a folder."""
    opened: list[Path] = []
    real_open = os.open

    def counting(path: Any, *args: Any, **kwargs: Any) -> int:
        if Path(path).name == MANIFEST_NAME:
            opened.append(Path(path))
        return real_open(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", counting)
    return opened
