"""Engine directories whose products compute in float8."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from goc_deploy.api import build_engines
from goc_deploy.api.exporting import export_with
from goc_deploy.engine_dir.reading import read_manifest
from goc_deploy.engines.ort import OrtBackend
from goc_deploy.options import EngineOptions
from tests.conftest import GOLDEN
from tests.end_to_end.test_int8 import OPTIONS
from tests.end_to_end.test_quantized import final_latents, relative


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fp8") / "engine"
    export_with(GOLDEN / "model.pt", path, replace(OPTIONS, quantize=("fp8",)))
    return path


def test_plans_run_and_weights_are_a_quarter(
    fp8: Path, golden_engine: Path, golden: dict[str, np.ndarray]
) -> None:
    plan = "fora:2+gc:1.2"
    found = final_latents(fp8, golden, plan, OrtBackend())
    full = final_latents(golden_engine, golden, plan, OrtBackend())
    assert 1e-3 < relative(found, full) < 0.2
    (unit,) = (u for u in read_manifest(fp8).graphs if u.name == "block_01_mlp")
    weight = next(p for p in unit.parameters if p.name == "mlp.fc1.weight")
    assert (unit.weight_format, weight.dtype) == ("fp8", "float8_e4m3fn")
    assert unit.end(weight) - weight.offset == 64 * 256


def test_tensorrt_builds_every_unit(fp8: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed (extra rtx)")
    manifest, built = build_engines(fp8, EngineOptions(capabilities=("8.9",)))
    assert built
    served = {name for engine in manifest.engines for name in engine.graphs}
    assert {unit.onnx for unit in manifest.graphs} <= served
