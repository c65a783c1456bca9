"""Engines that list what they run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from goc_deploy.engines.ort import OrtBackend
from goc_deploy.protocols import Buffer, Engine, Run, Stream


class CountedEngine:
    """A loaded graph that lists the size of the batch of every run in ``runs``."""

    def __init__(self, engine: Engine, runs: list[int]) -> None:
        self._engine, self._runs, self.dtypes = engine, runs, engine.dtypes

    def bind(
        self,
        inputs: Mapping[str, Buffer],
        outputs: Mapping[str, Buffer],
        stream: Stream | None = None,
    ) -> Run:
        size = next(iter(inputs.values())).shape[0]
        launch = self._engine.bind(inputs, outputs, stream)

        def run() -> None:
            self._runs.append(size)
            launch()

        return run


class CountingOrt(OrtBackend):
    """ONNX Runtime, which counts the runs of the graphs that have a certain input."""

    def __init__(self, counted_input: str) -> None:
        super().__init__()
        self._counted_input = counted_input
        self.runs: list[int] = []

    def load(self, *args: Any, **more: Any) -> Engine:  # type: ignore[override]
        engine = super().load(*args, **more)
        return CountedEngine(engine, self.runs) if self._counted_input in engine.dtypes else engine
