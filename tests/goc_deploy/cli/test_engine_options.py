from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.conftest import Command


@pytest.mark.parametrize(
    "option",
    [
        ("--compute-capability", "8.6"),
        ("--engine-weights", "shared"),
        ("--engine-workspace", "64"),
        ("--no-plugin",),
    ],
)
def test_options_of_engines_need_a_backend_that_has_engines(
    option: tuple[str, ...], command: Command
) -> None:
    done = command("goc-plan", "nowhere", "--backend", "onnxruntime", *option, code=2)
    assert "options of engines go with --backend tensorrt-rtx or --backend tensorrt" in done.stderr


def test_what_cannot_be_built_is_said_before_the_export_begins(
    command: Command, tmp_path: Path
) -> None:
    for backend, module in (("tensorrt-rtx", "tensorrt_rtx"), ("tensorrt", "tensorrt")):
        if importlib.util.find_spec(module) is None:
            done = command(
                "goc-export", "missing.pt", "-o", tmp_path / "engine", "--backend", backend, code=5
            )
            assert "pip install 'goc_deploy[" in done.stderr
        elif backend == "tensorrt-rtx":
            options = ("--backend", backend, "--compute-capability", "9.0")
            done = command("goc-export", "missing.pt", "-o", tmp_path / "engine", *options, code=2)
            assert "--compute-capability 9.0: tensorrt-rtx" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_plan_command_does_one_thing(command: Command) -> None:
    done = command("goc-plan", "nowhere", "--inspect", "--list", code=2)
    assert "--inspect, or a --backend to build engines for" in done.stderr
