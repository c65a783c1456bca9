"""Products of quantised values: what TensorRT's builder makes of them, and what they compute."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from goc_deploy.api.exporting import export_with
from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.engines.tensorrt import graphs
from goc_deploy.engines.tensorrt.quantized import use_constant_scales
from goc_deploy.options import ExportOptions
from goc_deploy.precision import Precision, WeightFormat
from tests.conftest import GOLDEN
from tests.engines.tensorrt.test_graphs import run, unit_of

OPTIONS = ExportOptions(num_heads=4, plans=("none",), steps=2, calibrate=1)
UNITS = ("block_01_attn", "block_01_mlp")
LIST_LAYERS = """
import sys
from pathlib import Path
from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.engines.tensorrt import build, jobs
from goc_deploy.engines.tensorrt import library as libraries
from goc_deploy.options import EngineOptions
path, capability, mode, units = sys.argv[1:]
library, logs = libraries.library_from_backend("tensorrt-rtx"), []
def kept(trt):
    logs.append(libraries.message_log(trt))
    return logs[-1]
build.message_log = kept
directory = EngineDir.open(Path(path))
options = EngineOptions(capabilities=(capability,), weight_mode=mode, plugin=False)
target = libraries.target_from_options(library, (capability,), directory.manifest.precision)
for job in jobs.wanted_engines(directory, target, options):
    if set(job.served) & {f"onnx/{unit}.onnx" for unit in units.split(",")}:
        request = build.BuildRequest(job.profiles, (capability,), 0)
        built = build.engine_from_onnx(library, jobs.graph_of_job(directory, job), request)
        assert built.engine, built.report.refusal
        print(*(text for _, text in logs[-1].lines if text.startswith("Layers:")))
"""


@pytest.fixture(scope="module", params=[("int8+smooth", "fp32"), ("fp8", "fp16")], ids=str)
def quantized(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """An engine directory, and TensorRT's name for its quantised values."""
    weight_format: WeightFormat
    precision: Precision
    weight_format, precision = request.param
    path = tmp_path_factory.mktemp("quantized") / "engine"
    options = replace(OPTIONS, quantize=(weight_format,), precision=precision)
    export_with(GOLDEN / "model.pt", path, options)
    return path, "FP8" if weight_format == "fp8" else "Int8"


@pytest.mark.parametrize("mode", ["embedded", "shared"])
def test_every_product_with_weights_is_one_of_8_bits(
    quantized: tuple[Path, str], mode: str
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed (extra rtx)")
    path, kind = quantized
    done = subprocess.run(
        [sys.executable, "-c", LIST_LAYERS, path, "8.9", mode, ",".join(UNITS)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "POLYGRAPHY_USE_TENSORRT_RTX": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = re.findall(r"LayerType: (\w+), Inputs: (.*?), Outputs: ", done.stdout)
    layers = [(name, re.findall(r"Datatype: (\w+)", operands)) for name, operands in found]
    products = [types for name, types in layers if name == "gemm" and kind in types]
    assert [types[:2] for types in products] == [[kind, kind]] * 4
    # Nothing reads quantised values but these products, and what moves values about.
    assert all(types == [kind] for name, types in layers if name != "gemm" and kind in types)


def test_constant_scales_change_no_result(quantized: tuple[Path, str]) -> None:
    path, _ = quantized
    directory = EngineDir.open(path)
    spec, rng = directory.manifest.model, np.random.default_rng(0)
    dtype = np.float32 if directory.manifest.precision == "fp32" else np.float16
    for name in UNITS:
        _, unit, content, weights = unit_of(path, name)
        inputs = {
            part: rng.standard_normal((2, spec.hidden), np.float32)
            for part in ("shift", "scale", "gate")
        }
        inputs["x"] = rng.standard_normal((2, spec.tokens, spec.hidden)).astype(dtype)
        model = graphs.model_from_bytes(content, "here")
        graphs.embed_weights(model, unit, weights, "here")
        expected = run(graphs.graph_bytes(model), inputs, inputs["x"].shape)
        assert use_constant_scales(model) == 2
        found = run(graphs.graph_bytes(model), inputs, inputs["x"].shape)
        error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        # Quotients that are rounded to float16 first may be rounded to another float8.
        assert error < (1e-5 if dtype == np.float32 else 1e-2)
