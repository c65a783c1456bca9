"""Weights that are exchanged at run time.

They are those of the other directory to the last bit, or the old ones.
"""

from __future__ import annotations

import gc
import shutil
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import goc_deploy
from goc_deploy.api import load_plans
from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.engine_dir.manifest import MANIFEST_NAME, Manifest
from goc_deploy.engine_dir.manifest_file import manifest_to_json
from goc_deploy.engine_dir.reading import read_manifest
from goc_deploy.engines.ort import OrtBackend
from goc_deploy.errors import (
    EngineDirError,
    EnvironmentUnsupportedError,
    GocError,
    ResourceError,
    UsageError,
)
from goc_deploy.protocols import Engine
from goc_deploy.runtime.exchange import load_weights
from goc_deploy.runtime.loading import load_pipelines
from goc_deploy.runtime.model_engines import Engines
from goc_deploy.runtime.pipeline import Pipeline
from goc_deploy.runtime.step_events import StepEvent
from tests.conftest import GOLDEN
from tests.reference import relative_l2
from tests.stand_ins.loading import copy_with_engines, stand_in_backend, stand_in_pipeline
from tests.stand_ins.onnxruntime import cuda_pipeline

PLAN = "fora:2+gc:1.2"
LABELS = [1, 7]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fine-tune of the golden model."""
    folder = tmp_path_factory.mktemp("tuned")
    generator = torch.Generator().manual_seed(1)
    state = torch.load(GOLDEN / "model.pt", weights_only=True)
    torch.save(
        {n: t + 0.02 * torch.randn(t.shape, generator=generator) for n, t in state.items()},
        folder / "model.pt",
    )
    goc_deploy.export(
        folder / "model.pt", folder / "engine", num_heads=4, plans=[PLAN], max_batch=2
    )
    return folder / "engine"


@pytest.fixture(scope="module")
def expected(golden_engine: Path, tuned: Path) -> dict[Path, np.ndarray]:
    """What ONNX Runtime draws from each directory."""
    return {
        path: drawn(goc_deploy.load(path, plan=PLAN, batch_size=2))
        for path in (golden_engine, tuned)
    }


@pytest.fixture
def pipe(golden_engine: Path) -> Pipeline:
    return goc_deploy.load(golden_engine, plan=PLAN, batch_size=2)


def drawn(pipe: Pipeline) -> np.ndarray:
    return pipe.generate(LABELS, seed=3).latents


def sha256(pipe: Pipeline) -> str:
    return str(pipe.generate([0]).report["checkpoint_sha256"])


def test_results_are_those_of_the_other_directory_and_back(
    pipe: Pipeline, golden_engine: Path, tuned: Path, expected: dict[Path, np.ndarray]
) -> None:
    assert not np.allclose(expected[golden_engine], expected[tuned], atol=0.1)
    for directory in (golden_engine, tuned, golden_engine, golden_engine, tuned):
        pipe.load_weights(directory)
        np.testing.assert_array_equal(drawn(pipe), expected[directory])
        assert sha256(pipe) == read_manifest(directory).provenance["checkpoint_sha256"]


def test_onnx_runtime_on_a_gpu_loads_its_sessions_again(
    golden_engine: Path, tuned: Path, expected: dict[Path, np.ndarray]
) -> None:
    pipe, runtime = cuda_pipeline(golden_engine, PLAN)
    before = pipe.generate([0]).report["weight_bytes"]
    for directory in (tuned, golden_engine):
        pipe.load_weights(directory)
        assert relative_l2(drawn(pipe), expected[directory]) < 1e-5
    gc.collect()
    assert pipe.generate([0]).report["weight_bytes"] == before
    assert runtime.sessions


@pytest.mark.parametrize("segments", [True, False])
def test_tensorrt_gets_other_values_at_the_same_addresses(
    golden_engine: Path, tuned: Path, tmp_path: Path, segments: bool
) -> None:
    engines = {
        name: copy_with_engines(path, tmp_path / name, "shared", segments=segments)
        for name, path in (("golden", golden_engine), ("tuned", tuned))
    }
    judged = {name: drawn(stand_in_pipeline(path, PLAN)[0]) for name, path in engines.items()}
    pipe, tensorrt = stand_in_pipeline(engines["golden"], PLAN, sessions=2)
    pipe.warmup((2,))

    def counted() -> tuple[int, int, int]:
        gc.collect()
        captures = Counter(call[0] for call in tensorrt.device.calls)["capture"]
        return captures, tensorrt.device.free_bytes(), tensorrt.loaded

    before = counted()
    for name in ("tuned", "golden", "tuned"):
        pipe.load_weights(tuned if name == "tuned" else engines["golden"])
        np.testing.assert_array_equal(drawn(pipe), judged[name])
        assert counted() == before  # no graph is recorded, no engine loaded, and no memory taken


def test_engines_that_hold_their_weights_say_what_to_build(
    golden_engine: Path, tuned: Path, tmp_path: Path
) -> None:
    pipe, _ = stand_in_pipeline(
        copy_with_engines(golden_engine, tmp_path / "engine", "embedded"), PLAN
    )
    before = drawn(pipe)
    with pytest.raises(
        EnvironmentUnsupportedError,
        match=r"hold their weights.*`EngineOptions.weight_mode=shared` and load again",
    ):
        pipe.load_weights(tuned)
    np.testing.assert_array_equal(drawn(pipe), before)
    assert sha256(pipe) == read_manifest(golden_engine).provenance["checkpoint_sha256"]


def changed(manifest: Manifest, path: str, **fields: Any) -> Manifest:
    return replace(
        manifest, files=tuple(replace(f, **fields) if f.path == path else f for f in manifest.files)
    )


def other_parameters(manifest: Manifest) -> Manifest:
    return replace(
        manifest,
        graphs=tuple(
            replace(u, parameters=u.parameters[::-1]) if u.name == "embed" else u
            for u in manifest.graphs
        ),
    )


MISFITS: dict[str, tuple[Callable[[Manifest], Manifest], str]] = {
    "precision": (lambda m: replace(m, precision="fp16"), "precision fp16 instead of fp32; "),
    "model": (
        lambda m: replace(m, model=replace(m.model, heads=8)),
        "heads 8 instead of 4; load that directory by itself",
    ),
    "graph": (
        lambda m: changed(m, "onnx/embed.onnx", sha256="0" * 64),
        "unit embed is another graph",
    ),
    "parameters": (other_parameters, "unit embed has other parameters"),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_a_directory_that_does_not_fit_is_refused_with_what_differs(
    pipe: Pipeline,
    golden_engine: Path,
    tuned: Path,
    expected: dict[Path, np.ndarray],
    tmp_path: Path,
    misfit: str,
) -> None:
    change, message = MISFITS[misfit]
    (tmp_path / MANIFEST_NAME).write_text(manifest_to_json(change(read_manifest(tuned))))
    with pytest.raises(UsageError, match=f"do not fit the engines that are loaded: .*{message}"):
        pipe.load_weights(tmp_path)
    np.testing.assert_array_equal(drawn(pipe), expected[golden_engine])


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], object], type[GocError], str]] = {
    "bit": (
        lambda d: damage(d / "onnx/block_03_mlp.weights"),
        EngineDirError,
        "block_03_mlp.weights was changed after",
    ),
    "file": (
        lambda d: (d / "onnx/final.weights").unlink(),
        EngineDirError,
        "final.weights is missing",
    ),
    "manifest": (lambda d: (d / MANIFEST_NAME).unlink(), EngineDirError, "manifest.json"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_directory_is_refused_before_anything_is_exchanged(
    pipe: Pipeline,
    golden_engine: Path,
    tuned: Path,
    expected: dict[Path, np.ndarray],
    tmp_path: Path,
    kind: str,
) -> None:
    change, error, message = DAMAGES[kind]
    shutil.copytree(tuned, tmp_path / "engine")
    change(tmp_path / "engine")
    with pytest.raises(error, match=message):
        pipe.load_weights(tmp_path / "engine")
    np.testing.assert_array_equal(drawn(pipe), expected[golden_engine])


class WatchedOrt(OrtBackend):
    """ONNX Runtime that lists its engines, and calls ``before_load`` before it loads one."""

    def __init__(self) -> None:
        super().__init__()
        self.before_load: Callable[[], object] = lambda: None
        self.engines: list[weakref.ref[Engine]] = []

    def load(self, *args: Any, **more: Any) -> Engine:
        self.before_load()
        engine = super().load(*args, **more)
        self.engines.append(weakref.ref(engine))
        return engine

    def alive(self) -> list[weakref.ref[Engine]]:
        gc.collect()
        return [engine for engine in self.engines if engine() is not None]


@pytest.fixture
def watched(golden_engine: Path) -> tuple[Pipeline, WatchedOrt]:
    backend = WatchedOrt()
    return load_pipelines(EngineDir.open(golden_engine), backend, [PLAN], 2, 1)[0], backend


def failing(call: Callable[..., Any], at: set[int]) -> Callable[..., Any]:
    """A function that is out of memory the n-th time, for n in ``at``."""
    count = 0

    def run(*args: Any, **more: Any) -> Any:
        nonlocal count
        count += 1
        if count in at:
            raise ResourceError("no memory is left")
        return call(*args, **more)

    return run


def test_an_exchange_that_fails_half_way_restores_the_weights(
    watched: tuple[Pipeline, WatchedOrt],
    golden_engine: Path,
    tuned: Path,
    expected: dict[Path, np.ndarray],
) -> None:
    pipe, backend = watched
    backend.before_load = failing(lambda: None, {6})
    with pytest.raises(ResourceError, match="no memory is left"):
        pipe.load_weights(tuned)
    np.testing.assert_array_equal(drawn(pipe), expected[golden_engine])
    assert sha256(pipe) == read_manifest(golden_engine).provenance["checkpoint_sha256"]
    pipe.load_weights(tuned)
    np.testing.assert_array_equal(drawn(pipe), expected[tuned])


def test_an_upload_that_fails_half_way_is_done_again_with_the_weights_from_before(
    golden_engine: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = copy_with_engines(golden_engine, tmp_path / "engine", "shared")
    backend, _ = stand_in_backend(engine)
    (pipe,) = load_pipelines(EngineDir.open(engine), backend, [PLAN], None, 1)
    before, stream = drawn(pipe), backend.own_stream
    monkeypatch.setattr(stream, "upload", failing(stream.upload, {9}))
    with pytest.raises(ResourceError, match="no memory is left"):
        pipe.load_weights(tuned)
    np.testing.assert_array_equal(drawn(pipe), before)


def test_weights_that_cannot_be_restored_stop_the_pipeline_with_the_reason(
    watched: tuple[Pipeline, WatchedOrt], tuned: Path
) -> None:
    pipe, backend = watched
    backend.before_load = failing(lambda: None, {6, 9})
    with pytest.raises(ResourceError):
        pipe.load_weights(tuned)
    for use in (lambda: drawn(pipe), lambda: pipe.warmup()):
        with pytest.raises(
            EnvironmentUnsupportedError,
            match=r"nor restored \(no memory is left\); load the engine dir",
        ):
            use()


def test_memory_holds_the_old_or_the_new_weights_of_a_graph(
    watched: tuple[Pipeline, WatchedOrt], tuned: Path
) -> None:
    pipe, backend = watched
    drawn(pipe)
    old = backend.alive()
    alive: list[int] = []

    def count() -> None:
        gc.collect()
        alive.append(sum(engine() is not None for engine in old))

    backend.before_load = count
    pipe.load_weights(tuned)
    count()
    exchanged = 3 + 8  # conditioning, embed, final, and the units of four blocks
    assert alive[:-1] == [len(old) - 1 - i for i in range(exchanged)]
    assert alive[-1] == len(old) - exchanged


@pytest.mark.parametrize("backend", ["onnxruntime", "stand-in"])
def test_requests_have_the_weights_of_one_directory_while_they_are_exchanged(
    golden_engine: Path, tuned: Path, tmp_path: Path, backend: str
) -> None:
    if backend == "stand-in":
        directory = copy_with_engines(golden_engine, tmp_path / "engine", "shared")
        pipe, _ = stand_in_pipeline(directory, PLAN, sessions=2, capacity=2**32)
    else:
        pipe = goc_deploy.load(golden_engine, plan=PLAN, batch_size=2, max_sessions=2)
    digests = [
        read_manifest(path).provenance["checkpoint_sha256"] for path in (golden_engine, tuned)
    ]
    of_digest = {digests[0]: drawn(pipe)}
    pipe.load_weights(tuned)
    of_digest[digests[1]] = drawn(pipe)
    ended = threading.Event()

    def draw() -> list[str]:
        seen = []
        while not ended.is_set():
            found = pipe.generate(LABELS, seed=3)
            seen.append(str(found.report["checkpoint_sha256"]))
            np.testing.assert_allclose(found.latents, of_digest[seen[-1]], atol=1e-5)
        return seen

    with ThreadPoolExecutor(3) as pool:
        runs = [pool.submit(draw) for _ in range(3)]
        try:
            for directory in (golden_engine, tuned) * 3:
                pipe.load_weights(directory)
                sha256(pipe)
        finally:
            ended.set()
        assert {digest for run in runs for digest in run.result(timeout=120)} == set(digests)


def test_pipelines_on_the_same_engines_share_their_weights(
    golden_engine: Path, tuned: Path, expected: dict[Path, np.ndarray]
) -> None:
    first, second = load_plans(golden_engine, [PLAN, "none"], batch_size=2)
    before = drawn(second)
    first.load_weights(tuned)
    np.testing.assert_array_equal(drawn(first), expected[tuned])
    assert sha256(second) == sha256(first)
    with second.with_plan(first.plan) as third:
        np.testing.assert_array_equal(drawn(third), expected[tuned])
    second.load_weights(golden_engine)
    np.testing.assert_array_equal(drawn(second), before)
    np.testing.assert_array_equal(drawn(first), expected[golden_engine])


def test_a_callback_cannot_exchange_the_weights_of_its_own_request(
    pipe: Pipeline, tuned: Path
) -> None:
    errors: list[str] = []

    def callback(_event: StepEvent) -> None:
        try:
            pipe.load_weights(tuned)
        except UsageError as error:
            errors.append(str(error))

    pipe.generate([1], callback=callback)
    assert len(errors) == 20
    assert "by a callback of a request that runs on them" in errors[0]


def test_a_closed_pipeline_and_engines_from_nowhere_have_no_weights_to_exchange(
    pipe: Pipeline, tuned: Path
) -> None:
    with pytest.raises(UsageError, match="come from no engine directory"):
        load_weights(tuned, Engines({}, {}), OrtBackend())
    pipe.close()
    with pytest.raises(EnvironmentUnsupportedError, match="closed"):
        pipe.load_weights(tuned)
