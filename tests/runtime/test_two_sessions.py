"""Two callers at a time, on every backend that has a stand-in for its GPU.

Each follows the reference's trajectory.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

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
