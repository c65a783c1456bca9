"""After a warm-up a request records and compiles nothing, on stand-ins for the GPU."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import goc_deploy
from goc_deploy.api.bench import compare_plans
from goc_deploy.errors import UsageError
from goc_deploy.options import BenchOptions
from tests.stand_ins.loading import copy_with_engines, stand_in_pipeline
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
    if sessions > 1:
        pipe._pool.run(
            pipe._new_session, lambda _: generate()
        )  # by the other session, while this one is taken
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


def test_the_cpu_runs_each_shape_once(golden_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with goc_deploy.load(golden_engine, plan="none", batch_size=2) as pipe:
        shapes: list[tuple[int, float]] = []
        run = goc_deploy.runtime.session.Session.run

        def counted(session: Any, request: Any, *more: Any) -> Any:
            shapes.append((len(request.noise), float(request.cfg_scale[0])))
            return run(session, request, *more)

        monkeypatch.setattr("goc_deploy.runtime.session.Session.run", counted)
        pipe.warmup((1, 2), guided=(True, False))
        assert shapes == [(1, 4.0), (1, 1.0), (2, 4.0), (2, 1.0)]
        for odd in (0, 3, 1.5):
            with pytest.raises(
                UsageError, match=r"images to warm up with must be within 1..2, got"
            ):
                pipe.warmup((odd,))  # type: ignore[arg-type]


def test_goc_bench_measures_replays_only(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, tensorrt = stand_in_pipeline(engine, PLAN)
    monkeypatch.setattr("goc_deploy.api.facade.load_plans", lambda *_args, **_options: [pipe])
    measured: list[int] = []

    def progress(what: str, _done: int, _total: int) -> None:
        measured.append(done(tensorrt)[0]) if what.startswith("round") else None

    found = compare_plans(engine, BenchOptions((PLAN,), (1,), repeats=2), progress)
    assert len(found["plans"][pipe.plan.name]["total_ms_rounds"]) == 2
    assert len(measured) == 4  # launched, recorded, then measured twice
    assert measured[2] == measured[3] == done(tensorrt)[0] > measured[1]
