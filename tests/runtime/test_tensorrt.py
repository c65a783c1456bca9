"""The TensorRT backend and sessions on stand-ins for the GPU and for TensorRT (`tests.stand_ins`)."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from goc_deploy.engine_keys import WEIGHT_MODES
from goc_deploy.engines.tensorrt_select import tensorrt_backend
from goc_deploy.options import EngineOptions, no_progress
from goc_deploy.runtime.loading import load_pipelines
from goc_deploy.runtime.pipeline import Pipeline
from tests.conftest import GOLDEN_PLANS
from tests.reference import worst_step
from tests.stand_ins.device import StandInDevice
from tests.stand_ins.tensorrt import StandInTensorrt

CAPABILITY = "8.9"


@pytest.fixture(scope="module")
def engines(golden_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The golden model with the stand-in's engines, by weight mode."""
    directories = {}
    for weights in WEIGHT_MODES:
        directories[weights] = tmp_path_factory.mktemp(weights) / "engine"
        shutil.copytree(golden_engine, directories[weights])
        options = EngineOptions(capabilities=(CAPABILITY,), weights=weights)
        StandInTensorrt(StandInDevice()).build(directories[weights], options, no_progress)
    return directories


def loaded(directory: Path, plan: str, sessions: int = 1, **device: object) -> tuple[Pipeline, StandInTensorrt]:
    tensorrt = StandInTensorrt(StandInDevice(**device))
    backend = tensorrt_backend(directory, tensorrt.library, CAPABILITY, tensorrt.device, build=tensorrt.build)
    return load_pipelines(directory, backend, [plan], None, sessions)[0], tensorrt


@pytest.mark.parametrize("spec", GOLDEN_PLANS)
@pytest.mark.parametrize("weights", WEIGHT_MODES)
def test_golden_trajectories_launched_one_by_one_and_replayed(
    engines: dict[str, Path], golden: dict[str, np.ndarray], weights: str, spec: str
) -> None:
    pipe, tensorrt = loaded(engines[weights], spec)
    request = {"cfg_scale": 2.0, "latents": golden["noise"], "trajectory": True}
    first = pipe.generate(golden["labels"], **request)
    launched = len(tensorrt.calls)
    second = pipe.generate(golden["labels"], **request)
    third = pipe.generate(golden["labels"], **request)
    assert worst_step(first.trajectory, golden[GOLDEN_PLANS[spec]]) < 1e-5
    for replayed in (second, third):
        np.testing.assert_array_equal(replayed.trajectory, first.trajectory)
    done = [call[0] for call in tensorrt.device.calls]
    assert (done.count("capture"), done.count("replay")) == (20, 40)
    assert len(tensorrt.calls) == 2 * launched  # once launched, once captured, never enqueued by the third run
