"""One registry of the operators of ONNX for all exports of a process.

torch parses the source of 500 operators for every graph again, which takes 0.4 s.
"""

from __future__ import annotations

import functools

from torch.onnx._internal.exporter._registration import ONNXRegistry

_made = functools.cache(ONNXRegistry.from_torchlib)


def keep_registry() -> None:
    """Let exports of this process share the registry."""
    ONNXRegistry.from_torchlib = staticmethod(_made)
