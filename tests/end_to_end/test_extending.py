"""docs/extending.md, to the letter: a package with a policy and a correction of its own."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from goc_deploy.engine_dir.reading import read_manifest
from goc_deploy.schedule import Schedule, gradient
from tests.conftest import Command

PAGE = (Path(__file__).parents[2] / "docs" / "extending.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the page's package is installed to."""
    source, target = tmp_path_factory.mktemp("my-cache"), tmp_path_factory.mktemp("site")
    (source / "my_cache.py").write_text(blocks("python")[0])
    (source / "pyproject.toml").write_text(blocks("toml")[0])
    offline = ("--no-index", "--no-deps", "--no-build-isolation", "--quiet")
    pip = (sys.executable, "-m", "pip", "install", *offline, "--target", target, ".")
    subprocess.run(pip, check=True, cwd=source, timeout=120)
    return target


@pytest.fixture
def folder(golden_engine: Path, tmp_path: Path) -> Path:
    """A folder with an engine directory that a test may change."""
    shutil.copytree(golden_engine, tmp_path / "engine")
    return tmp_path


def test_the_page_is_true(
    site: Path, folder: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))
    )
    install, *lines = blocks("sh")[0].splitlines()
    assert install == "pip install ."
    for line in lines:
        name, *words = shlex.split(line.replace("--output mine.png", "--latents-output mine.npy"))
        command(name, *words, cwd=folder)
    schedule = Schedule.load(folder / "engine" / "schedules" / "mine.json")
    assert schedule.policy == "alternate:3+decaying:0.8,warmup=2"
    assert [not row for row in schedule.coefficients[3]] == [
        unit // 2 % 3 == 0 for unit in range(schedule.units)
    ]
    assert schedule.coefficients[3][2] != schedule.coefficients[4][0] != gradient(0.8)
    assert np.isfinite(np.load(folder / "mine.npy")).all()
    subprocess.run([sys.executable, "-c", blocks("python")[1]], check=True, cwd=folder, timeout=120)
    assert [entry.name for entry in read_manifest(folder / "engine").plans][-1] == "mine-10"
    for name in ("goc-plan", "goc-export"):
        text = " ".join(command(name, "--help").stdout.split())
        assert re.search("from installed packages:? alternate, decaying", text)


def test_a_plan_of_a_registered_policy_runs_without_it_and_is_not_made_without_it(
    site: Path, folder: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as there:
        there.setenv(
            "PYTHONPATH", os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))
        )
        command("goc-plan", "engine", "alternate", cwd=folder)
    command(
        "goc-run",
        "engine",
        "--plan",
        "alternate",
        "--labels",
        "1",
        "--latents-output",
        "a.npy",
        cwd=folder,
    )
    done = command("goc-plan", "engine", "fora:2+decaying", code=2, cwd=folder)
    assert "unknown correction 'decaying'" in done.stderr


def test_nothing_in_an_engine_directory_is_imported(
    site: Path, folder: Path, command: Command
) -> None:
    shutil.copytree(site, folder / "engine", dirs_exist_ok=True)
    assert (
        "unknown policy 'alternate'"
        in command("goc-plan", ".", "alternate", code=2, cwd=folder / "engine").stderr
    )
