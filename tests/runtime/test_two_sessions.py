"""Two callers at a time, on every backend that has a stand-in for its GPU.

Each follows the reference's trajectory.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from goc_deploy import CancelToken
from goc_deploy.errors import CancelledError
from goc_deploy.runtime.pipeline import Pipeline
from tests.conftest import GOLDEN_PLANS
from tests.reference import worst_step
from tests.stand_ins.loading import copy_with_engines, stand_in_pipeline
from tests.stand_ins.onnxruntime import cuda_pipeline


@pytest.fixture(scope="module")
def shared(golden_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden model with the engines of the stand-in for TensorRT."""
    return copy_with_engines(golden_engine, tmp_path_factory.mktemp("two") / "engine", "shared")


def check(pipe: Pipeline, golden: dict[str, np.ndarray], spec: str) -> None:
    """Two threads, each for three runs: launched, then recorded and replayed."""

    def run(_: int) -> list[float]:
        request = {"cfg_scale": 2.0, "latents": golden["noise"], "trajectory": True}
        results = [pipe.generate(golden["labels"], **request).trajectory for _ in range(3)]
        return [worst_step(found, golden[GOLDEN_PLANS[spec]]) for found in results]

    with ThreadPoolExecutor(2) as pool:
        assert max(max(errors) for errors in pool.map(run, range(2))) < 1e-5


@pytest.mark.parametrize("spec", GOLDEN_PLANS)
def test_two_callers_of_tensorrt_follow_the_golden_trajectory(
    shared: Path, golden: dict[str, np.ndarray], spec: str
) -> None:
    pipe, _ = stand_in_pipeline(shared, spec, sessions=2)
    check(pipe, golden, spec)


@pytest.mark.parametrize("spec", GOLDEN_PLANS)
def test_two_callers_of_onnx_runtime_on_a_gpu_follow_the_golden_trajectory(
    golden_engine: Path, golden: dict[str, np.ndarray], spec: str
) -> None:
    pipe, _ = cuda_pipeline(golden_engine, spec, sessions=2)
    check(pipe, golden, spec)


class _CancelledAtCheck(CancelToken):
    """A token that is cancelled when it is looked at for the n-th time."""

    def __init__(self, check: int) -> None:
        super().__init__()
        self.checks, self._last = 0, check

    @property
    def cancelled(self) -> bool:
        self.checks += 1
        return self.checks >= self._last


@pytest.mark.parametrize("stand_in", ["tensorrt", "onnxruntime-cuda"])
def test_a_call_on_a_gpu_ends_before_a_step_recorded_or_not(
    golden_engine: Path, shared: Path, stand_in: str
) -> None:
    pipe, _ = (
        stand_in_pipeline(shared, "fora:2", sessions=1)
        if stand_in == "tensorrt"
        else cuda_pipeline(golden_engine, "fora:2", sessions=1)
    )
    expected = pipe.generate([1, 7], seed=3).latents
    for _ in range(3):  # launched, recorded, replayed
        counting = _CancelledAtCheck(10**9)
        np.testing.assert_array_equal(
            pipe.generate([1, 7], seed=3, cancel=counting).latents, expected
        )
        assert pipe.plan.steps <= counting.checks <= pipe.plan.steps + 5
        for check in (3, counting.checks // 2, counting.checks):
            with pytest.raises(CancelledError):
                pipe.generate([1, 7], seed=3, cancel=_CancelledAtCheck(check))
    np.testing.assert_array_equal(pipe.generate([1, 7], seed=3).latents, expected)
