"""A GPU of host memory: the real device on a driver that holds it to the rules of CUDA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from goc_deploy.engines.cuda import CudaDevice, CudaStream
from goc_deploy.engines.driver import Driver
from tests.stand_ins.driver import StandInDriver


class StandInStream(CudaStream):
    """A stream that hands over what is queued when a thread no longer holds it."""

    _depth = 0

    @contextmanager
    def held(self) -> Iterator[None]:
        with super().held():
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
                if not self._depth:
                    self._device.gpu.streams[self.handle].hand_over()


class StandInDevice(CudaDevice):
    """`goc_deploy.engines.cuda.CudaDevice` on a `StandInDriver`, whose attributes it has too."""

    def __init__(self, capacity: int = 2**31, *, graphs: bool = True) -> None:
        self.gpu = StandInDriver(capacity)
        super().__init__(Driver(self.gpu), 0, graphs=graphs)
        self.enter()

    def stream(self, *, graphs: bool = True) -> StandInStream:
        return StandInStream(self, graphs=graphs and self.graphs)

    def _cubin(self) -> bytes:
        """The stand-in needs no machine code: it has the kernels for the host."""
        return b""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.gpu, name)
