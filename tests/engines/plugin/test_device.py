"""The kernels and engines with them on a GPU. What the other tests show on the host, these show where it runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from goc_deploy.engines import driver
from goc_deploy.engines.plugin.kernel import (
    DTYPES,
    MAX_UNITS,
    Stack,
    device_kernels,
    geometry,
    parameters_from_addresses,
)
from goc_deploy.engines.plugin.registration import register_plugin
from goc_deploy.engines.tensorrt_store import build_engines, read_engine
from goc_deploy.exporters.cache_update import predict_graph
from goc_deploy.options import EngineOptions, no_progress
from goc_deploy.publish import read_manifest
from tests.conftest import GOLDEN, Command
from tests.engines.directories import with_graph
from tests.engines.plugin.arrays import Case, assert_close, random_case
from tests.gpus import library_here

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def context(gpu: None) -> None:  # noqa: ARG001
    torch.zeros(1, device="cuda")  # makes the context


def on_device(array: np.ndarray) -> torch.Tensor:
    """The bytes of an array on the GPU."""
    return torch.from_numpy(np.ascontiguousarray(array).view(np.uint8).reshape(-1)).cuda()


def launcher(stack: Stack, case: Case, dtype: str) -> tuple[Callable[[], None], Callable[[], list[np.ndarray]]]:
    """Launch on the current stream, each stored prediction over the entry that dies; and read what came of it."""
    inputs = [on_device(array) for array in case.inputs]
    outputs = [inputs[0], *(inputs[3 + entry] for entry in case.last_entry)]
    addresses = [t.data_ptr() for t in inputs], [t.data_ptr() for t in outputs]
    shape = case.x.shape
    chosen = geometry(shape, dtype, *addresses)
    parameters, kernels = parameters_from_addresses(stack, shape, *addresses), device_kernels()

    def launch() -> None:
        kernels.launch(chosen, parameters, torch.cuda.current_stream().cuda_stream)

    def read() -> list[np.ndarray]:
        torch.cuda.synchronize()
        return [t.cpu().numpy().view(case.x.dtype).reshape(shape) for t in outputs]

    return launch, read


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 256, 1152), (3, 17, 40), (1, 5, 3)])
@pytest.mark.parametrize("captured", [False, True])
def test_the_gpu_computes_what_numpy_does_also_in_a_cuda_graph(
    shape: tuple[int, int, int], dtype: str, captured: bool
) -> None:
    stack = Stack((1, 2, 3, 4) * 3, (False, True, True, True) * 3)
    case = random_case(stack, shape, dtype, 0)
    launch, read = launcher(stack, case, dtype)
    if captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launch()
        graph.replay()
    else:
        launch()
    for found, expected in zip(read(), [case.x_out, *case.stored], strict=True):
        assert_close(found, expected, dtype, 100)


def test_the_most_units_fit_into_a_launch() -> None:
    stack = Stack((4,) * MAX_UNITS, (True,) * MAX_UNITS)
    case = random_case(stack, (2, 16, 64), "float16", 0)
    launch, read = launcher(stack, case, "float16")
    launch()
    for found, expected in zip(read(), [case.x_out, *case.stored], strict=True):
        assert_close(found, expected, "float16", 1000)


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
@pytest.mark.parametrize("weights", ["embedded", "shared"])
def test_engines_build_for_this_gpu_and_load(backend: str, weights: str, tmp_path: Path, command: Command) -> None:
    library = library_here(backend, "fp16")
    engine, plans = tmp_path / "engine", ("--plan", "none", "--plan", "fora:2+gc:1.2")
    command("goc-export", GOLDEN / "model.pt", "-o", engine, "--num-heads", 4, "--precision", "fp16", *plans)
    manifest = read_manifest(engine)
    stack = predict_graph("2w*12", manifest.model, "fp16").SerializeToString()
    with_graph(engine, "onnx/stack.onnx", stack, predict={**manifest.predict, "2w*12": "onnx/stack.onnx"})
    options = EngineOptions(backend, (driver.device_capability(),), weights)
    manifest, built = build_engines(engine, options, no_progress)
    assert built == len(manifest.engines)
    assert sum(entry.plugin_layers for entry in manifest.engines) == 1
    register_plugin(library.trt)
    runtime: Any = library.trt.Runtime(library.trt.Logger(library.trt.Logger.ERROR))
    for entry in manifest.engines:
        assert runtime.deserialize_cuda_engine(bytes(read_engine(engine, manifest, entry))) is not None, entry.path
