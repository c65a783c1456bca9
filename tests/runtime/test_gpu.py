"""Sessions on a GPU.

`tests/runtime/test_tensorrt.py` shows the same on stand-ins.
"""

from __future__ import annotations

import gc
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import goc_deploy
from goc_deploy.api import build_engines, verify_engines
from goc_deploy.engine_dir.keys import ENGINE_BACKENDS, WEIGHT_MODES
from goc_deploy.engine_dir.reading import read_manifest
from goc_deploy.engines import driver
from goc_deploy.engines.cuda import cuda_device
from goc_deploy.engines.plugin import stacking
from goc_deploy.errors import EnvironmentUnsupportedError
from goc_deploy.options import EngineOptions
from goc_deploy.runtime.pipeline import Pipeline
from tests.conftest import GOLDEN, GOLDEN_PLANS, Command
from tests.distances import relative_l2, worst_step
from tests.gpus import library_here

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("gpu")]

ORT = "onnxruntime-cuda"
GRADIENT = "fora:2+gc:1.2"
SLACK_BYTES = 2**24  # that libraries may take for themselves between two runs
REQUEST = {"cfg_scale": 2.0, "trajectory": True}
WAYS = [(backend, weights) for backend in ENGINE_BACKENDS for weights in WEIGHT_MODES]


@pytest.fixture(scope="module")
def built(golden_engine: Path, tmp_path_factory: pytest.TempPathFactory):
    """The golden model with engines for this GPU, by backend and weight mode."""
    known: dict[tuple[str, str], Path] = {}

    def directory(backend: str, weights: str) -> Path:
        library_here(backend, "fp32")
        if (backend, weights) not in known:
            target = tmp_path_factory.mktemp(f"{backend}-{weights}") / "engine"
            shutil.copytree(golden_engine, target)
            build_engines(target, EngineOptions(backend, (driver.device_capability(),), weights))
            known[backend, weights] = target
        return known[backend, weights]

    return directory


@pytest.mark.parametrize("spec", GOLDEN_PLANS)
@pytest.mark.parametrize(("backend", "weights"), WAYS)
def test_golden_trajectories_launched_one_by_one_and_replayed(
    built, golden: dict[str, np.ndarray], backend: str, weights: str, spec: str
) -> None:
    with goc_deploy.load(built(backend, weights), plan=spec, backend=backend) as pipe:
        first, second, third = (
            pipe.generate(golden["labels"], latents=golden["noise"], **REQUEST) for _ in range(3)
        )
    assert worst_step(first.trajectory, golden[GOLDEN_PLANS[spec]]) < 1e-3
    np.testing.assert_array_equal(second.trajectory, first.trajectory)
    np.testing.assert_array_equal(third.trajectory, first.trajectory)
    assert first.report["engine_weights"] == weights


@pytest.mark.parametrize(("backend", "weights"), WAYS)
def test_every_graph_computes_what_onnx_runtime_computes(built, backend: str, weights: str) -> None:
    found = verify_engines(built(backend, weights), EngineOptions(backend, weight_mode=weights))
    assert max(difference.relative_l2 for difference in found) < 1e-3


@pytest.mark.parametrize("backend", ENGINE_BACKENDS)
def test_stacks_of_the_plugin_in_a_trajectory(
    built,
    golden: dict[str, np.ndarray],
    tmp_path: Path,
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stacking, "STORES_THAT_FUSE", 3)
    directory = shutil.copytree(built(backend, "shared"), tmp_path / "engine")
    with goc_deploy.load(directory, plan=GRADIENT, backend=backend) as pipe:
        assert any(entry.plugin_layers for entry in read_manifest(directory).engines)
        for _ in range(2):
            found = pipe.generate(golden["labels"], latents=golden["noise"], **REQUEST)
            assert worst_step(found.trajectory, golden["fora_50_gc"]) < 1e-3


def check_two_sessions(pipe: Pipeline) -> None:
    """Two threads, of which each wants now this image, now that one, get what one thread got."""
    alone = {seed: pipe.generate([seed], seed=seed).latents for seed in range(4)}

    def work(first: int) -> None:
        for seed in (first, first + 2) * 5:
            np.testing.assert_array_equal(pipe.generate([seed], seed=seed).latents, alone[seed])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(2)))


@pytest.mark.parametrize(("backend", "weights"), WAYS)
def test_two_sessions_at_once_give_what_one_gives(built, backend: str, weights: str) -> None:
    with goc_deploy.load(
        built(backend, weights), plan=GRADIENT, backend=backend, max_sessions=2
    ) as pipe:
        check_two_sessions(pipe)


def check_narrow(
    command: Command, engine: Path, golden: dict[str, np.ndarray], backend: str, precision: str
) -> None:
    """An engine directory of a precision, loaded and run twice."""
    options = ("--num-heads", 4, "--precision", precision, "--plan", GRADIENT)
    command("goc-export", GOLDEN / "model.pt", "-o", engine, *options)
    with goc_deploy.load(engine, backend=backend) as pipe:
        for _ in range(2):
            found = pipe.generate(golden["labels"], latents=golden["noise"], cfg_scale=2.0)
            assert relative_l2(found.latents, golden["fora_50_gc"][-1]) < (
                0.02 if precision == "fp16" else 0.1
            )


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("backend", ENGINE_BACKENDS)
def test_narrow_precisions_stay_near_the_golden_trajectory(
    golden: dict[str, np.ndarray], tmp_path: Path, command: Command, backend: str, precision: str
) -> None:
    library_here(backend, precision)
    check_narrow(command, tmp_path / "engine", golden, backend, precision)


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("spec", GOLDEN_PLANS)
def test_onnx_runtime_follows_the_golden_trajectories_recorded_and_replayed(
    golden_engine: Path, golden: dict[str, np.ndarray], spec: str, graphs: bool
) -> None:
    options = {"backend": ORT, "device": "cuda:0", "cuda_graphs": graphs}
    with goc_deploy.load(golden_engine, plan=spec, **options) as pipe:
        first, second = (
            pipe.generate(golden["labels"], latents=golden["noise"], **REQUEST) for _ in range(2)
        )
    assert worst_step(first.trajectory, golden[GOLDEN_PLANS[spec]]) < 1e-4
    np.testing.assert_array_equal(second.trajectory, first.trajectory)
    found = {
        name: first.report[name]
        for name in ("backend", "device_index", "cuda_graphs", "sessions_without_graph")
    }
    assert found == {
        "backend": ORT,
        "device_index": 0,
        "cuda_graphs": graphs,
        "sessions_without_graph": 0,
    }


def check_sums(directory: Path, golden: dict[str, np.ndarray], backend: str) -> None:
    """Accumulators in place of features follow the trajectory, recorded and replayed."""
    with goc_deploy.load(directory, plan=GRADIENT, backend=backend, history="sums") as pipe:
        first, *others = (
            pipe.generate(golden["labels"], latents=golden["noise"], **REQUEST) for _ in range(3)
        )
    assert first.report["plan_form"] == "sums"
    assert worst_step(first.trajectory, golden["fora_50_gc"]) < 1e-3
    for other in others:
        np.testing.assert_array_equal(other.trajectory, first.trajectory)


@pytest.mark.parametrize("backend", ENGINE_BACKENDS)
def test_sums_follow_the_golden_trajectory(
    built, golden: dict[str, np.ndarray], backend: str
) -> None:
    check_sums(built(backend, "shared"), golden, backend)


def test_onnx_runtime_with_sums_follows_the_golden_trajectory(
    golden_engine: Path, golden: dict[str, np.ndarray]
) -> None:
    check_sums(golden_engine, golden, ORT)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_onnx_runtime_in_narrow_precisions_stays_near_the_golden_trajectory(
    golden: dict[str, np.ndarray], tmp_path: Path, command: Command, precision: str
) -> None:
    check_narrow(command, tmp_path / "engine", golden, ORT, precision)


def test_two_sessions_of_onnx_runtime_give_what_one_gives(golden_engine: Path) -> None:
    with goc_deploy.load(golden_engine, plan=GRADIENT, backend=ORT, max_sessions=2) as pipe:
        check_two_sessions(pipe)


def test_onnx_runtime_gives_the_memory_of_a_session_back(golden_engine: Path) -> None:
    device = cuda_device()

    def run() -> tuple[int, int]:
        with goc_deploy.load(golden_engine, plan=GRADIENT, backend=ORT) as pipe:
            return pipe.generate([1]).report["weight_bytes"], device.free_bytes() or 0

    run()  # code, and the arena of the process, stay
    gc.collect()
    before = device.free_bytes() or 0
    weight_bytes, within = run()
    gc.collect()
    assert within <= before
    assert (device.free_bytes() or 0) >= before - SLACK_BYTES
    files = sum(path.stat().st_size for path in golden_engine.glob("onnx/*.weights"))
    assert 0.9 * files < weight_bytes <= files  # files are padded


def test_onnx_runtime_refuses_a_gpu_that_is_not_there(golden_engine: Path) -> None:
    with pytest.raises(EnvironmentUnsupportedError, match="there is no CUDA device 99"):
        goc_deploy.load(golden_engine, backend=ORT, device="cuda:99")


def test_the_command_takes_the_gpu_by_itself(
    golden_engine: Path, tmp_path: Path, command: Command
) -> None:
    engine = shutil.copytree(golden_engine, tmp_path / "engine")
    done = command("goc-run", engine, "--labels", "1", "--latents-output", tmp_path / "x.npy")
    assert "on onnxruntime " not in done.stderr
