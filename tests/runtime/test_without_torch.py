"""Sessions in processes that can import neither torch nor onnx.

`tests.engines.test_cuda_bindings` has those on a GPU.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.conftest import GOLDEN, GOLDEN_PLANS

ROOT = Path(__file__).parents[2]
RUN = """
import sys
for name in ("torch", "onnx", "onnxscript", "diffusers", "tensorrt", "cuda"):
    sys.modules[name] = None
import numpy as np
import goc_deploy
from tests.distances import worst_step

engine, plan, path, expected = sys.argv[1:]
golden = np.load(path)
with goc_deploy.load(engine, plan=plan, backend="onnxruntime") as pipe:
    found = pipe.generate(golden["labels"], latents=golden["noise"], cfg_scale=2.0, trajectory=True)
assert worst_step(found.trajectory, golden[expected]) < 1e-5
"""


@pytest.mark.parametrize("spec", ["none", "fora:2+gc:1.2"])
def test_golden_trajectories_on_the_cpu_need_neither_torch_nor_onnx(
    golden_engine: Path, spec: str
) -> None:
    words = [
        sys.executable,
        "-c",
        RUN,
        str(golden_engine),
        spec,
        str(GOLDEN / "golden.npz"),
        GOLDEN_PLANS[spec],
    ]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


READ = """
import sys
for name in ("torch", "safetensors.torch"):
    sys.modules[name] = None
from pathlib import Path
from goc_deploy.conditions.tensor_files import arrays_from_file

assert arrays_from_file(Path(sys.argv[1]))["a"].tolist() == [0.0, 1.0]
"""


def test_safetensors_files_are_read_without_torch(tmp_path: Path) -> None:
    save_file({"a": np.arange(2, dtype=np.float32)}, tmp_path / "x.safetensors")
    words = [sys.executable, "-c", READ, str(tmp_path / "x.safetensors")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
