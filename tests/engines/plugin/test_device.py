"""Engines with the plugin on a GPU.

The other tests show the same on the host.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from goc_deploy.api import build_engines
from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.engine_dir.reading import read_manifest
from goc_deploy.engines import driver
from goc_deploy.engines.cuda import cuda_device
from goc_deploy.engines.plugin.registration import register_plugin
from goc_deploy.engines.tensorrt.store import read_engine
from goc_deploy.exporters.graphs.cache_update import predict_graph
from goc_deploy.options import EngineOptions, no_progress
from tests.conftest import GOLDEN, Command
from tests.engines.directories import with_graph
from tests.gpus import library_here

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("context")]


@pytest.fixture
def context(gpu: None) -> None:  # noqa: ARG001
    cuda_device().enter()  # the plugin uses the context of its thread


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
@pytest.mark.parametrize("weights", ["embedded", "shared"])
def test_engines_build_for_this_gpu_and_load(
    backend: str, weights: str, tmp_path: Path, command: Command
) -> None:
    library = library_here(backend, "fp16")
    engine, plans = tmp_path / "engine", ("--plan", "none", "--plan", "fora:2+gc:1.2")
    command(
        "goc-export",
        GOLDEN / "model.pt",
        "-o",
        engine,
        "--num-heads",
        4,
        "--precision",
        "fp16",
        *plans,
    )
    manifest = read_manifest(engine)
    stack = predict_graph("2w*12", manifest.model, "fp16").SerializeToString()
    with_graph(
        engine, "onnx/stack.onnx", stack, predict={**manifest.predict, "2w*12": "onnx/stack.onnx"}
    )
    options = EngineOptions(backend, (driver.device_capability(),), weights)
    manifest, built = build_engines(engine, options, no_progress)
    assert built == len(manifest.engines)
    assert sum(entry.plugin_layers for entry in manifest.engines) == 1
    register_plugin(library.trt)
    directory = EngineDir.open(engine)
    runtime: Any = library.trt.Runtime(library.trt.Logger(library.trt.Logger.ERROR))
    for entry in manifest.engines:
        assert runtime.deserialize_cuda_engine(bytes(read_engine(directory, entry))) is not None, (
            entry.path
        )
