"""Sessions on ONNX Runtime's CUDA provider.

The GPU and the provider are stand-ins (`tests.stand_ins`).
"""

from __future__ import annotations

import shutil
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import goc_deploy
from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.engines.ort import OrtBackend
from goc_deploy.engines.ort_cuda import OrtCudaBackend
from goc_deploy.errors import EnvironmentUnsupportedError, ResourceError
from goc_deploy.runtime import buffers, modulation_buffers
from goc_deploy.runtime.loading import UnlistedPlans, load_pipelines
from goc_deploy.trace import Span
from tests.conftest import GOLDEN_PLANS
from tests.reference import worst_step
from tests.stand_ins.device import StandInDevice
from tests.stand_ins.onnxruntime import StandInOrtCudaBackend, StandInRuntime, cuda_pipeline

GRADIENT = "fora:2+gc:1.2"


@pytest.mark.parametrize("spec", GOLDEN_PLANS)
def test_golden_trajectories_run_and_replayed(
    golden_engine: Path, golden: dict[str, np.ndarray], spec: str
) -> None:
    pipe, runtime = cuda_pipeline(golden_engine, spec)
    request = {"cfg_scale": 2.0, "latents": golden["noise"], "trajectory": True}
    first, second = (pipe.generate(golden["labels"], **request) for _ in range(2))
    assert worst_step(first.trajectory, golden[GOLDEN_PLANS[spec]]) < 1e-5
    np.testing.assert_array_equal(second.trajectory, first.trajectory)
    counts = Counter(runtime.calls)
    assert counts["replay"] > counts["record"] > 0
    assert not {"capture", "replay"} & {
        call[0] for call in runtime.device.calls
    }  # the graphs are ONNX Runtime's


def test_a_step_that_computes_nothing_runs_our_kernel_and_a_full_step_one_segment(
    golden_engine: Path,
) -> None:
    pipe, _ = cuda_pipeline(golden_engine, GRADIENT)
    spans: list[Span] = []
    pipe.generate([1], spans=spans)
    names = [span.name for span in spans if span.category == "launch"]
    assert names[-5:] == ["start", "embed", "predict 0-7", "final", "sampler"]
    assert names.count("segment") == 10
    assert pipe.generate([1]).report["sessions_without_graph"] == 0


def test_steps_of_a_kind_are_the_same_graphs_of_onnx_runtime(golden_engine: Path) -> None:
    pipe, runtime = cuda_pipeline(golden_engine, "fora:2")
    for _ in range(2):
        pipe.generate([1])
    assert Counter(runtime.calls)["record"] == 5  # conditioning, embed, segment, final, sampler


@pytest.mark.parametrize("when", ["at load", "in a run"])
def test_sessions_go_on_without_graphs_that_cannot_be_recorded(
    golden_engine: Path, golden: dict[str, np.ndarray], when: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    pipe, runtime = cuda_pipeline(golden_engine, GRADIENT, refuses_graphs=when)
    for _ in range(2):
        found = pipe.generate(
            golden["labels"], cfg_scale=2.0, latents=golden["noise"], trajectory=True
        )
        assert worst_step(found.trajectory, golden["fora_50_gc"]) < 1e-5
    assert not runtime.calls
    assert "without a CUDA graph" in caplog.text or "has no CUDA graph" in caplog.text


def test_without_graphs_no_session_records(
    golden_engine: Path, golden: dict[str, np.ndarray]
) -> None:
    pipe, runtime = cuda_pipeline(golden_engine, GRADIENT, graphs=False)
    found = pipe.generate(golden["labels"], cfg_scale=2.0, latents=golden["noise"], trajectory=True)
    assert worst_step(found.trajectory, golden["fora_50_gc"]) < 1e-5
    assert not runtime.calls


def test_too_little_memory_is_named_as_memory(golden_engine: Path) -> None:
    with pytest.raises(ResourceError, match="memory is full"):
        cuda_pipeline(golden_engine, GRADIENT, out_of_memory="at load")
    pipe, runtime = cuda_pipeline(golden_engine, GRADIENT)
    runtime.out_of_memory = "in a run"
    with pytest.raises(ResourceError, match="memory is full"):
        pipe.generate([1])
    runtime.out_of_memory = ""
    pipe.generate([1])  # and fine afterwards
    with pytest.raises(ResourceError, match=r"of weights, .* GB are available"):
        load_pipelines(
            EngineDir.open(golden_engine),
            StandInOrtCudaBackend(StandInRuntime(StandInDevice(1_000_000))),
            [GRADIENT],
            None,
            1,
        )


def test_two_sessions_take_turns_on_the_stream(golden_engine: Path) -> None:
    pipe, runtime = cuda_pipeline(golden_engine, GRADIENT, sessions=2)
    alone = {seed: pipe.generate([seed], seed=seed).latents for seed in range(4)}
    failures: list[BaseException] = []

    def work(first: int) -> None:
        try:
            for seed in (first, first + 2, first):
                np.testing.assert_array_equal(pipe.generate([seed], seed=seed).latents, alone[seed])
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not failures
    assert len({session.handle for session in runtime.sessions}) == 1


@pytest.fixture(scope="module")
def sampled_engine(golden_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden model with plans of a multistep and of a stochastic sampler."""
    engine = shutil.copytree(golden_engine, tmp_path_factory.mktemp("samplers") / "engine")
    for name, sampler in (("multistep", "dpm++"), ("stochastic", "ddpm")):
        goc_deploy.add_plan(engine, "fora:2+gc:0.5", name=name, sampler=sampler, steps=9)
    return engine


@pytest.mark.parametrize("budget", [None, 200_000])
@pytest.mark.parametrize("plan", ["multistep", "stochastic", GRADIENT])
def test_steps_that_share_launches_compute_what_steps_of_their_own_do(
    sampled_engine: Path, monkeypatch: pytest.MonkeyPatch, plan: str, budget: int | None
) -> None:
    if budget is not None:
        monkeypatch.setattr(modulation_buffers, "TABLE_BUDGET_BYTES", budget)
    pipe, runtime = cuda_pipeline(sampled_engine, plan)
    allocated = buffers.allocate_buffers(
        StandInOrtCudaBackend(runtime), pipe.spec, "fp32", pipe.plan, pipe.batch_size
    )
    assert (allocated.modulation.chunk < pipe.plan.steps) == (budget is not None)
    with goc_deploy.load(sampled_engine, plan=plan, backend="onnxruntime") as cpu:
        for labels, seed in (([3, 1, 4], 1), ([5], 2), ([3, 1, 4], 3)):
            found, expected = (
                one.generate(labels, seed=seed, trajectory=True).trajectory for one in (pipe, cpu)
            )
            assert worst_step(found, expected) < 1e-5


def no_graph(signature: str) -> bytes:
    """The graphs of a plan that predicts nothing."""
    raise AssertionError(signature)


def test_a_sampler_may_reach_back_to_other_steps_each_time(golden_engine: Path) -> None:
    """As that of PNDM does: a step reads at most three estimates, and which these are changes."""
    rng = np.random.default_rng(0)
    history = np.zeros((20, 5))
    for step in range(20):
        history[step, rng.choice(5, 3, replace=False)] = rng.uniform(-0.1, 0.1, 3)
        history[step, step:] = 0.0  # there is nothing before the first step

    opened = EngineDir.open(golden_engine)
    plan = opened.plan("none")
    rows, estimate = tuple(map(tuple, history.tolist())), ((0.5, -0.25),) * 20
    sampler = replace(plan.sampler, lag_coefficients=rows, estimate=estimate)
    unlisted = UnlistedPlans({"far": replace(plan, sampler=sampler)}, no_graph)
    pipe, cpu = (
        load_pipelines(opened, backend, ["far"], None, 1, unlisted=unlisted)[0]
        for backend in (StandInOrtCudaBackend(StandInRuntime(StandInDevice())), OrtBackend())
    )
    assert pipe.plan.sampler.reach > pipe.plan.sampler.lags
    for seed in (1, 2):
        found, expected = (
            one.generate([3, 1], seed=seed, trajectory=True).trajectory for one in (pipe, cpu)
        )
        assert worst_step(found, expected) < 1e-5


def test_nothing_is_allocated_and_only_the_result_is_read_back(golden_engine: Path) -> None:
    pipe, runtime = cuda_pipeline(golden_engine, GRADIENT)
    pipe.generate([3, 1])
    runtime.device.calls.clear()
    pipe.generate([3, 1])
    done = Counter(call[0] for call in runtime.device.calls)
    assert (done["allocate"], done["download"]) == (0, 1)


@pytest.mark.filterwarnings("ignore:Specified provider:UserWarning")
def test_onnx_runtime_without_its_cuda_libraries_names_them(golden_engine: Path) -> None:
    pytest.importorskip("cuda.pathfinder")
    refusal = r"cannot start its CUDAExecutionProvider|pip install onnxruntime-gpu|on this device"
    directory = EngineDir.open(golden_engine)
    with pytest.raises(EnvironmentUnsupportedError, match=refusal):
        load_pipelines(directory, OrtCudaBackend(StandInDevice(graphs=False)), [GRADIENT], None, 1)
