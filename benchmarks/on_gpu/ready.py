"""Whether this Python has what a make target needs, and a sentence on what it lacks.

This module imports nothing else.

python benchmarks/on_gpu/ready.py test-gpu
"""

from __future__ import annotations

import sys
from importlib import import_module

NEEDED = {
    "test-gpu": (
        "goc_deploy",
        "onnxruntime",
        "pytest",
        "hypothesis",
        "torch",
        "onnx",
        "onnxscript",
        "safetensors",
    ),
    "bench-gpu": ("goc_deploy", "onnxruntime", "numpy"),
}
UNSUPPORTED = 5  # goc_deploy.errors.EnvironmentUnsupportedError, which may not be importable


def missing(target: str) -> dict[str, str]:
    """Modules that cannot be imported, and why."""
    found = {}
    for name in NEEDED[target]:
        try:
            import_module(name)
        except ImportError as reason:
            found[name] = str(reason)
    return found


def main(argv: list[str]) -> int:
    (target,) = argv
    lacking = missing(target)
    if lacking:
        print(
            f"{sys.executable} cannot import {', '.join(lacking)}, which make {target} needs "
            f"({next(iter(lacking.values()))}); "
            f"install it there, or name another Python: make {target} PYTHON=... or VENV=...",
            file=sys.stderr,
        )
        return UNSUPPORTED
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
