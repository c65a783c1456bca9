"""Plans with heads in tables."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import goc_deploy
from goc_deploy.display.engines import graph_rows, launched_graphs
from goc_deploy.display.plans import head_rows
from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.trace import Span
from tests.conftest import Command
from tests.heads import FORMS, add_head


@pytest.fixture(scope="module")
def engine(golden_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = Path(shutil.copytree(golden_engine, tmp_path_factory.mktemp("shown") / "engine"))
    add_head(target, "fora-2", FORMS["hidden3-2"])
    add_head(target, "fora-2", FORMS["patch3"], strength=0)
    return target


def test_there_is_a_row_per_head(engine: Path) -> None:
    columns, rows = head_rows(EngineDir.open(engine).plans())
    assert [dict(zip(columns, row, strict=True)) for row in rows] == [
        {
            "plan": "fora-2+hidden3-2",
            "head": "hidden3-2",
            "weights of a step": "529 x 16",
            "steps with a head": "20 of 20",
            "numbers learned": "169280",
            "kB": "677.1",
            "fitted for guidance": "1 to 8",
        },
        {
            "plan": "fora-2+patch3-zero",
            "head": "patch3",
            "weights of a step": "145 x 16",
            "steps with a head": "0 of 20",
            "numbers learned": "0",
            "kB": "185.6",
            "fitted for guidance": "1 to 8",
        },
    ]


def test_what_a_step_is_said_to_launch_is_what_it_launches(engine: Path) -> None:
    spans: list[Span] = []
    with goc_deploy.load(engine, plan="fora-2+patch3-zero") as pipe:
        pipe.generate([1], spans=spans)
        shown = launched_graphs(pipe.plan, pipe.manifest, 1)
    assert shown[-1] == "onnx/sampler+patch3.onnx"
    assert [s.name for s in spans if s.category == "launch"][-1] == "sampler+patch3"
    names = [row[0] for row in graph_rows(EngineDir.open(engine))[1]]
    assert names[-2:] == ["sampler+hidden3-2", "sampler+patch3"]


def test_commands_print_heads(engine: Path, command: Command) -> None:
    shown = command("goc-plan", engine, "--show", "fora-2+hidden3-2").stdout
    assert "529 x 16" in shown
    assert "patch3" not in shown
    assert "145 x 16" in command("goc-plan", engine, "--inspect").stdout
    assert "fora-2+patch3" in command("goc-plan", engine, "--list").stdout
    assert "fitted for" not in command("goc-plan", engine, "--show", "fora-2").stdout
