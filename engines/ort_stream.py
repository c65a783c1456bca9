"""The stream of a session of ONNX Runtime on the CPU."""

from __future__ import annotations

import onnxruntime

from goc_deploy.engines.host import HostStream


class OrtStream(HostStream):
    """The stream of a session on the CPU, whose launches can be stopped between two operators.

    Attributes:
        options: options of every launch, or None if launches cannot be interrupted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.options: onnxruntime.RunOptions | None = None

    def interrupt(self) -> None:
        """See `goc_deploy.protocols.Stream.interrupt`."""
        options = self.options
        if options is not None:
            options.terminate = True

    def resume(self, *, interruptible: bool) -> None:
        """See `goc_deploy.protocols.Stream.resume`."""
        self.options = onnxruntime.RunOptions() if interruptible else None
