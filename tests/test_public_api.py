from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import goc_deploy

RUN = """
import sys, goc_deploy
first = {m for m in ("torch", "onnx", "onnxruntime", "tensorrt", "numpy") if m in sys.modules}
assert not first, first
with goc_deploy.load(sys.argv[1]) as pipe:
    pipe.generate([1])
after = {m for m in ("torch", "onnx", "onnxscript", "safetensors", "matplotlib", "diffusers") if m in sys.modules}
assert not after, after
"""


def test_the_public_names_are_these() -> None:
    assert sorted(goc_deploy.__all__) == sorted(
        [
            "GocError", "ModelSpec", "Plan", "Schedule", "__version__", "add_plan", "compile", "export", "load",
            "register_correction", "register_policy",
        ]
    )  # fmt: skip
    assert all(getattr(goc_deploy, name) for name in goc_deploy.__all__)


def test_importing_needs_nothing_heavy_and_running_needs_neither_torch_nor_onnx(golden_engine: Path) -> None:
    done = subprocess.run([sys.executable, "-c", RUN, str(golden_engine)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_compile_takes_what_the_documentation_says(golden_engine: Path) -> None:
    schedule = goc_deploy.Schedule.load(golden_engine / "schedules" / "fora-2.json")
    with goc_deploy.load(golden_engine, plan="fora:2") as pipe:
        plan = goc_deploy.compile(schedule, pipe.spec, "ddim", steps=20)
        assert plan.launches == pipe.plan.launches
