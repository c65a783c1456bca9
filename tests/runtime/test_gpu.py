"""Sessions on a GPU: what `tests/runtime/test_tensorrt.py` shows on stand-ins, shown where it runs."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import goc_deploy
from goc_deploy.api import build_engines, verify_engines
from goc_deploy.engine_keys import ENGINE_BACKENDS, WEIGHT_MODES
from goc_deploy.engines import driver
from goc_deploy.engines.cuda import cuda_device
from goc_deploy.engines.plugin import stacking
from goc_deploy.options import EngineOptions
from goc_deploy.publish import read_manifest
from tests.conftest import GOLDEN, GOLDEN_PLANS, Command
from tests.gpus import library_here
from tests.reference import relative_l2, worst_step

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("gpu")]

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


def test_copies_marks_and_graphs_of_the_device() -> None:
    device = cuda_device()
    stream, memory = device.stream(), device.allocate((2, 64), "bfloat16")
    values = np.arange(128, dtype=np.float32).reshape(2, 64)
    tensor = memory.owner.view(torch.bfloat16)

    def double() -> None:
        tensor.mul_(2)

    stream.upload(values, memory)
    stream.wait()
    with torch.cuda.stream(stream._stream):
        double()
    (replay,) = stream.recorded([double])
    stream.mark(0)
    replay()
    stream.mark(1)
    np.testing.assert_array_equal(stream.download(memory), 4 * values)
    assert 0 <= stream.marked_ms(2)[1] < 1e3


@pytest.mark.parametrize("spec", GOLDEN_PLANS)
@pytest.mark.parametrize(("backend", "weights"), WAYS)
def test_golden_trajectories_launched_one_by_one_and_replayed(
    built, golden: dict[str, np.ndarray], backend: str, weights: str, spec: str
) -> None:
    with goc_deploy.load(built(backend, weights), plan=spec, backend=backend) as pipe:
        first, second, third = (pipe.generate(golden["labels"], latents=golden["noise"], **REQUEST) for _ in range(3))
    assert worst_step(first.trajectory, golden[GOLDEN_PLANS[spec]]) < 1e-3
    np.testing.assert_array_equal(second.trajectory, first.trajectory)
    np.testing.assert_array_equal(third.trajectory, first.trajectory)
    assert first.report["engine_weights"] == weights


@pytest.mark.parametrize(("backend", "weights"), WAYS)
def test_every_graph_computes_what_onnx_runtime_computes(built, backend: str, weights: str) -> None:
    found = verify_engines(built(backend, weights), EngineOptions(backend, weights=weights))
    assert max(difference.relative_l2 for difference in found) < 1e-3


@pytest.mark.parametrize("backend", ENGINE_BACKENDS)
def test_stacks_of_the_plugin_in_a_trajectory(
    built, golden: dict[str, np.ndarray], tmp_path: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stacking, "STORES_THAT_FUSE", 3)
    directory = shutil.copytree(built(backend, "shared"), tmp_path / "engine")
    with goc_deploy.load(directory, plan="fora:2+gc:1.2", backend=backend) as pipe:
        assert any(entry.plugin_layers for entry in read_manifest(directory).engines)
        for _ in range(2):
            found = pipe.generate(golden["labels"], latents=golden["noise"], **REQUEST)
            assert worst_step(found.trajectory, golden["fora_50_gc"]) < 1e-3


@pytest.mark.parametrize(("backend", "weights"), WAYS)
def test_two_sessions_at_once_give_what_one_gives(built, backend: str, weights: str) -> None:
    with goc_deploy.load(built(backend, weights), plan="fora:2+gc:1.2", backend=backend, max_sessions=2) as pipe:
        alone = {seed: pipe.generate([seed], seed=seed).latents for seed in range(4)}
        failures: list[BaseException] = []

        def work(first: int) -> None:
            try:
                for seed in (first, first + 2) * 5:
                    np.testing.assert_array_equal(pipe.generate([seed], seed=seed).latents, alone[seed])
            except BaseException as failure:
                failures.append(failure)

        threads = [threading.Thread(target=work, args=(first,)) for first in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("backend", ENGINE_BACKENDS)
def test_narrow_precisions_stay_near_the_golden_trajectory(
    golden: dict[str, np.ndarray], tmp_path: Path, command: Command, backend: str, precision: str
) -> None:
    library_here(backend, precision)
    engine = tmp_path / "engine"
    options = ("--num-heads", 4, "--precision", precision, "--plan", "fora:2+gc:1.2")
    command("goc-export", GOLDEN / "model.pt", "-o", engine, *options)
    with goc_deploy.load(engine, backend=backend) as pipe:
        for _ in range(2):
            found = pipe.generate(golden["labels"], latents=golden["noise"], cfg_scale=2.0)
            assert relative_l2(found.latents, golden["fora_50_gc"][-1]) < (0.02 if precision == "fp16" else 0.1)


def test_onnx_runtime_on_cuda_follows_the_golden_trajectory(golden_engine: Path, golden: dict[str, np.ndarray]) -> None:
    with goc_deploy.load(golden_engine, plan="fora:2+gc:1.2", backend="onnxruntime-cuda") as pipe:
        found = pipe.generate(golden["labels"], latents=golden["noise"], **REQUEST)
    assert worst_step(found.trajectory, golden["fora_50_gc"]) < 1e-3


def test_the_command_takes_the_gpu_by_itself(golden_engine: Path, tmp_path: Path, command: Command) -> None:
    engine = shutil.copytree(golden_engine, tmp_path / "engine")
    done = command("goc-run", engine, "--labels", "1", "--latents-output", tmp_path / "x.npy")
    assert "on onnxruntime " not in done.stderr
