"""Engine directories whose products compute in int8: their files, results and engines."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from goc_deploy.api import build_engines
from goc_deploy.api.exporting import export_with
from goc_deploy.engine_dir.reading import read_manifest
from goc_deploy.engines.ort import OrtBackend
from goc_deploy.engines.ort_quantized import optimizers_in_the_way
from goc_deploy.options import EngineOptions, ExportOptions, WeightMode
from tests.conftest import GOLDEN
from tests.end_to_end.test_quantized import MergingOrt, final_latents, relative

OPTIONS = ExportOptions(
    num_heads=4, plans=("none", "fora:2+gc:1.2"), quantize=("int8+smooth",), calibrate=2
)


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All blocks but the first in int8."""
    path = tmp_path_factory.mktemp("int8") / "engine"
    export_with(GOLDEN / "model.pt", path, replace(OPTIONS, quantize_exclude=("first",)))
    return path


def test_excluding_every_unit_leaves_every_file_as_it_is(
    golden_engine: Path, tmp_path: Path
) -> None:
    path = tmp_path / "engine"
    export_with(GOLDEN / "model.pt", path, replace(OPTIONS, quantize_exclude=("block_*",)))
    ours, theirs = (
        {file.path: file.sha256 for file in read_manifest(engine).files}
        for engine in (path, golden_engine)
    )
    graphs = {name for name in ours if name.startswith("onnx/")}
    assert {name: ours[name] for name in graphs} == {name: theirs[name] for name in graphs}
    assert read_manifest(path).graphs == read_manifest(golden_engine).graphs
    assert "quantization" not in read_manifest(path).provenance


@pytest.mark.parametrize("plan", ["none", "fora:2+gc:1.2"])
def test_plans_run_in_int8(
    int8: Path, golden_engine: Path, golden: dict[str, np.ndarray], plan: str
) -> None:
    found = final_latents(int8, golden, plan, OrtBackend())
    full = final_latents(golden_engine, golden, plan, OrtBackend())
    assert 1e-4 < relative(found, full) < 0.1
    merged = final_latents(int8, golden, plan, MergingOrt())
    assert relative(merged, found) < 0.05


def test_onnx_runtime_multiplies_integers(int8: Path, tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    options.use_per_session_threads = False  # as the pool of OrtBackend wants it
    OrtBackend()
    made = onnxruntime.InferenceSession(
        int8 / "onnx" / "block_01_mlp.onnx",
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=optimizers_in_the_way(
            (int8 / "onnx" / "block_01_mlp.onnx").read_bytes(), {"int8", "float32"}, "CPU"
        ),
    )
    assert made is not None
    content = (tmp_path / "optimised.onnx").read_bytes()
    assert content.count(b"MatMulIntegerToFloat") >= 2
    assert b"DequantizeLinear" not in content


def test_images_ranges_and_choices_are_recorded(int8: Path) -> None:
    manifest = read_manifest(int8)
    record = manifest.provenance["quantization"]
    assert (record["images"], record["seed"], record["sampler"]) == (2, 2**32, "ddim")
    assert record["plans"] == ["none", "fora-2+gc-1.2"]
    assert set(record["units"]) == set(manifest.model.unit_names[2:])
    product = record["units"]["block_01_mlp"]["mlp.fc1.weight"]
    assert product["runs"] == 20 + 10  # computed steps of one batch
    assert 127 * product["scale"] > 0
    for unit in manifest.graphs:
        if unit.name in record["units"]:
            assert unit.weight_format == "int8+smooth"
            assert unit.relative_l2 is not None
            assert 1e-4 < unit.relative_l2 < 0.1
    assert not (int8 / "observing").exists()
    options = json.loads((int8 / "manifest.json").read_text())["provenance"]["options"]
    assert options["quantize"] == ["int8+smooth"]


def test_an_equal_export_is_up_to_date(int8: Path) -> None:
    options = replace(OPTIONS, quantize_exclude=("first",))
    assert not export_with(GOLDEN / "model.pt", int8, options)[1]


@pytest.mark.parametrize("weight_mode", ["embedded", "shared"])
def test_tensorrt_builds_every_unit(int8: Path, weight_mode: WeightMode) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed (extra rtx)")
    options = EngineOptions(capabilities=("8.6",), weight_mode=weight_mode)
    manifest, built = build_engines(int8, options)
    assert built
    served = {name for engine in manifest.engines for name in engine.graphs}
    assert {unit.onnx for unit in manifest.graphs} <= served
