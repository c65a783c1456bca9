"""After a warm-up a request records and compiles nothing, on stand-ins for the GPU."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from goc_deploy.api.bench import compare_plans
from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.engines.ort import OrtBackend
from goc_deploy.errors import UsageError
from goc_deploy.options import BenchOptions
from goc_deploy.protocols import Buffer, Stream
from goc_deploy.runtime.loading import load_pipelines
from tests.stand_ins.device import StandInDevice
from tests.stand_ins.loading import copy_with_engines, gpu_of_stand_ins, stand_in_pipeline
from tests.stand_ins.tensorrt import StandInTensorrt

PLAN = "fora:2+gc:1.2"


@pytest.fixture(scope="module")
def engine(golden_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_with_engines(golden_engine, tmp_path_factory.mktemp("warm") / "engine", "shared")


def done(tensorrt: StandInTensorrt) -> tuple[int, int]:
    """Graphs that were recorded, kernels that were compiled."""
    return Counter(call[0] for call in tensorrt.device.calls)["capture"], len(tensorrt.compiled)


@pytest.mark.parametrize("sessions", [1, 2])
def test_after_a_warm_up_nothing_is_recorded_or_compiled(engine: Path, sessions: int) -> None:
    pipe, tensorrt = stand_in_pipeline(engine, PLAN, sessions)
    pipe.warmup((1, 3), guided=(True, False))
    before = done(tensorrt)
    assert before[0] > 0
    requests = [(labels, scale) for labels in ([4], [1, 2, 3], [5, 5, 5]) for scale in (1.0, 3.0)]

    def generate() -> None:
        for labels, scale in requests:
            pipe.generate(labels, cfg_scale=scale)

    generate()
    if sessions > 1:  # by the other session, while this one is taken
        finished: list[object] = []

        def generate_meanwhile(event: object) -> None:
            generate()
            finished.append(event)

        pipe.generate([4], callback=generate_meanwhile)
        assert len(finished) == pipe.plan.steps
    assert done(tensorrt) == before


def test_by_default_one_image_with_guidance_is_warm(engine: Path) -> None:
    pipe, tensorrt = stand_in_pipeline(engine, PLAN)
    pipe.warmup()
    before = done(tensorrt)
    pipe.generate([7])
    assert done(tensorrt) == before
    pipe.generate([7], cfg_scale=1.0)
    pipe.generate([7], cfg_scale=1.0)
    assert done(tensorrt) != before


class RecordingOrt(OrtBackend):
    """ONNX Runtime whose stream lists, for each run, its images and rows of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.runs: list[tuple[int, int]] = []

    def stream(self) -> Stream:
        stream, rows = super().stream(), 0
        upload, download = stream.upload, stream.download

        def recorded_upload(values: np.ndarray, target: Buffer) -> None:
            nonlocal rows
            rows = max(rows, len(values)) if values.ndim == 1 else rows
            upload(values, target)

        def recorded_download(source: Buffer) -> np.ndarray:
            nonlocal rows
            self.runs.append((source.shape[0], rows))
            rows = 0
            return download(source)

        stream.upload = recorded_upload  # type: ignore[method-assign]
        stream.download = recorded_download  # type: ignore[method-assign]
        return stream


def test_the_cpu_runs_each_shape_once(golden_engine: Path) -> None:
    backend = RecordingOrt()
    with load_pipelines(EngineDir.open(golden_engine), backend, ["none"], 2, 1)[0] as pipe:
        pipe.warmup((1, 2), guided=(True, False))
        assert backend.runs == [(1, 2), (1, 1), (2, 4), (2, 2)]
        for odd in (0, 3, 1.5):
            with pytest.raises(
                UsageError, match=r"images to warm up with must be within 1..2, got"
            ):
                pipe.warmup((odd,))  # type: ignore[arg-type]


def test_goc_bench_measures_replays_only(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensorrt = StandInTensorrt(StandInDevice())
    gpu_of_stand_ins(monkeypatch, tensorrt)
    measured: list[int] = []

    def progress(what: str, _done: int, _total: int) -> None:
        measured.append(done(tensorrt)[0]) if what.startswith("round") else None

    options = BenchOptions((PLAN,), (1,), repeats=2, backend="tensorrt-rtx")
    (report,) = compare_plans(engine, options, progress)["plans"].values()
    assert len(report["total_ms_rounds"]) == 2
    assert len(measured) == 4  # launched, recorded, then measured twice
    assert measured[2] == measured[3] == done(tensorrt)[0] > measured[1]
