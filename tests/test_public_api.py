from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np

import goc_deploy

RUN = """
import sys, goc_deploy
first = {m for m in ("torch", "onnx", "onnxruntime", "tensorrt", "numpy") if m in sys.modules}
assert not first, first
with goc_deploy.load(sys.argv[1]) as pipe:
    pipe.generate([1])
after = {m for m in ("torch", "onnx", "onnxscript", "matplotlib", "diffusers") if m in sys.modules}
assert not after, after
"""


def test_the_public_names_are_these() -> None:
    types = ["CancelToken", "GocError", "ModelSpec", "Plan", "Schedule", "__version__"]
    functions = [
        "add_plan",
        "compile",
        "export",
        "load",
        "load_plans",
        "register_correction",
        "register_policy",
    ]
    assert sorted(goc_deploy.__all__) == sorted([*types, *functions, "errors"])
    assert all(getattr(goc_deploy, name) for name in goc_deploy.__all__)


def test_every_error_is_reached_from_the_top_and_has_the_exit_code_of_the_tree() -> None:
    tree = re.findall(r"(\w+Error) +([1-9]\d?) ", goc_deploy.errors.__doc__ or "")
    assert len(tree) == 14
    for name, code in tree:
        error = getattr(goc_deploy.errors, name)
        assert issubclass(error, goc_deploy.GocError)
        assert error.exit_code == int(code)


def test_plans_that_are_loaded_together_give_what_each_gives_alone(golden_engine: Path) -> None:
    names = ["none", "fora-2"]
    pipes = goc_deploy.load_plans(golden_engine, names, batch_size=2, max_sessions=2)
    for name, pipe in zip(names, pipes, strict=True):
        with goc_deploy.load(golden_engine, plan=name, batch_size=2) as alone, pipe:
            np.testing.assert_array_equal(
                pipe.generate([1, 7]).latents, alone.generate([1, 7]).latents
            )
    assert [pipe.closed for pipe in pipes] == [True, True]


def test_importing_needs_nothing_heavy_and_running_needs_neither_torch_nor_onnx(
    golden_engine: Path,
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(golden_engine)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_compile_takes_what_the_documentation_says(golden_engine: Path) -> None:
    schedule = goc_deploy.Schedule.load(golden_engine / "schedules" / "fora-2.json")
    with goc_deploy.load(golden_engine, plan="fora:2") as pipe:
        plan = goc_deploy.compile(schedule, pipe.spec, "ddim", steps=20)
        assert plan.launches == pipe.plan.launches
