"""The commands as modules, which a tree that is not installed has instead of scripts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from goc_deploy.cli import __main__ as module
from tests import conftest
from tests.conftest import Command, command_words


def test_every_command_can_be_run_as_a_module(capsys: pytest.CaptureFixture[str]) -> None:
    for name in module.COMMANDS:
        assert module.main([f"goc-{name}", "--help"]) == 0
        assert "Usage: goc-" + name in capsys.readouterr().out


def test_a_command_that_does_not_exist_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert (module.main([]), module.main(["goc-paint"])) == (2, 2)
    assert "export|plan|run|bench|eval" in capsys.readouterr().err


def test_the_modules_are_the_commands_of_the_package() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    for name in module.COMMANDS:
        assert f'goc-{name} = "goc_deploy.cli.{name}:main"' in text


def test_tests_run_the_module_where_no_command_is_installed(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(conftest, "BIN", tmp_path)
    assert command_words("goc-run") == [sys.executable, "-m", "goc_deploy.cli", "goc-run"]
    done: subprocess.CompletedProcess[str] = command("goc-run", "--help", cwd=tmp_path)
    assert done.stdout.startswith("Usage: goc-run")
