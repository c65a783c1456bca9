"""The build process imports no torch.

So only the bindings can find NVRTC for the plugin there.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from goc_deploy.engines.plugin.stacking import stack_updates
from goc_deploy.engines.tensorrt import process
from goc_deploy.exporters.graphs.cache_update import predict_graph
from goc_deploy.spec import ModelSpec

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed (extra rtx)")
pytest.importorskip("polygraphy", reason="polygraphy is not installed (extra rtx)")

ELF = b"\x7fELF"
SPEC = ModelSpec(2, 8, 2, 16, 2, 2, 4, 10, False)
WITHOUT_TORCH = """
import json, sys, threading
from types import SimpleNamespace
from multiprocessing import Pipe

sys.modules["torch"] = None  # whoever imports it fails
from goc_deploy.engines.tensorrt import process
from goc_deploy.engines import driver
from goc_deploy.engines.plugin import kernel, registration
from goc_deploy.engines.tensorrt.build import BuildRequest
from goc_deploy.errors import EnvironmentUnsupportedError

ours, theirs = Pipe()
served = {"args": (theirs, "tensorrt-rtx"), "kwargs": {"plugin": True}}
threading.Thread(target=process._serve, **served, daemon=True).start()
with open(sys.argv[1], "rb") as file:
    request = BuildRequest([json.loads(sys.argv[2])], ["8.6"], 0)
    built = process.BuildProcess(None, ours, None).build(file.read(), request)

(creators,) = registration._registered.values()
creator = next(creator for creator in creators if creator.name == "GocCacheUpdate2")
plugin = creator.create_plugin("p", [], None)
try:
    plugin.on_shape_change([], [])  # which a builder that times the plugin calls
    here = "kernels of this GPU"
except EnvironmentUnsupportedError as reason:
    here = str(reason)

loaded = []
driver.load_driver = lambda: SimpleNamespace(cuCtxGetDevice=lambda: 0)
driver.current_context, driver.capability_of = lambda _driver: 1, lambda *_: "9.0"
kernel.load_kernels = lambda _driver, cubin: loaded.append(cubin[:4].hex())
plugin.on_shape_change([], [])
print(json.dumps([built.report.plugin_layers, here, loaded]))  # behind what Polygraphy prints
"""


def test_the_build_process_compiles_the_kernels_of_the_plugin_without_torch(tmp_path: Path) -> None:
    stack = predict_graph("1*1 2w*12", SPEC, "fp16")
    stack_updates(stack)
    (tmp_path / "stack.onnx").write_bytes(stack.SerializeToString())
    shapes = {}
    for value in stack.graph.input:
        sizes = [dimension.dim_value or 2 for dimension in value.type.tensor_type.shape.dim]
        if any(dimension.dim_param for dimension in value.type.tensor_type.shape.dim):
            shapes[value.name] = [sizes] * 3
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, str(tmp_path / "stack.onnx"), json.dumps(shapes)],
        capture_output=True,
        text=True,
        timeout=120,
        env=process.build_environment("tensorrt-rtx", tmp_path),
    )
    assert done.returncode == 0, done.stderr
    plugin_layers, here, there = json.loads(done.stdout.splitlines()[-1])
    assert plugin_layers == 1
    assert "NVRTC" not in here  # without a GPU there is no driver, or no context
    assert there == [ELF.hex()]
