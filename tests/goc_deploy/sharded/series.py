"""A series of 2,000 images that takes little time, and its file without shards."""

from __future__ import annotations

import hashlib
from pathlib import Path

IMAGES = 2000
# One step without guidance: the faults under test do not depend on what is drawn.
SERIES = (
    *("--plan", "none", "--steps", 1, "--cfg-scale", 1, "--seed", 5, "--threads", 1),
    *("--backend", "onnxruntime", "--num-images", IMAGES),
)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
