"""The stream of a session of ONNX Runtime on the CPU."""

from __future__ import annotations

import onnxruntime

from goc_deploy.engines.host import HostStream


class OrtStream(HostStream):
    """The stream of a session on the CPU, whose launches can be stopped between two operators.

    Attributes:
        options: options of every run that is bound to the stream.
    """

    def __init__(self) -> None:
        super().__init__()
        self.options = onnxruntime.RunOptions()

    def interrupt(self) -> None:
        """See `goc_deploy.protocols.Stream.interrupt`."""
        self.options.terminate = True

    def resume(self) -> None:
        """See `goc_deploy.protocols.Stream.resume`."""
        self.options.terminate = False
