"""An engine that computes nothing."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from goc_deploy.engines.ort import OrtBackend
from goc_deploy.protocols import Buffer, Run


class SilentEngine:
    """An engine that fills its outputs with zeros, and counts its ``runs``."""

    def __init__(self, backend: OrtBackend) -> None:
        self._backend, self.runs = backend, 0

    def bind(self, _inputs: object, outputs: Mapping[str, Buffer], *_: object) -> Run:
        def run() -> None:
            self.runs += 1
            for output in outputs.values():
                self._backend.upload(np.zeros(output.shape, output.dtype), output)

        return run
