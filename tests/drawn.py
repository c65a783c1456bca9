"""Pictures of the library from a process of its own, whose thread pool has a chosen size.

The pool of a process cannot be changed, and its size changes the last bits.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np

DRAWN = """
import json, sys
import goc_deploy
engine, plan, threads, label, *seeds = json.loads(sys.argv[1])
with goc_deploy.load(engine, plan=plan, backend="onnxruntime", threads=threads) as pipe:
    for seed in seeds:
        sys.stdout.buffer.write(pipe.generate([label], seed=seed).images.tobytes())
"""


def digits_drawn(
    engine: Path, label: int, seeds: Iterable[int], *, threads: int, plan: str | None = None
) -> list[np.ndarray]:
    """One digit (28, 28) uint8 for each seed."""
    arguments = json.dumps([str(engine), plan, threads, label, *seeds])
    line = [sys.executable, "-c", DRAWN, arguments]
    done = subprocess.run(line, capture_output=True, check=True)
    return list(np.frombuffer(done.stdout, np.uint8).reshape(-1, 28, 28))
