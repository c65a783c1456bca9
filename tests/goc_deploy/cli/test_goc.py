"""The commands under one name, which a tree that is not installed has as a module."""

from __future__ import annotations

import runpy
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

from goc_deploy.cli.goc import COMMANDS, command, main
from goc_deploy.version import __version__
from tests import conftest
from tests.conftest import Command, command_words

HEAVY = ("torch", "onnx", "onnxruntime", "numpy", "PIL", "rich", "matplotlib")


def test_every_command_is_the_same_under_both_names(capsys: pytest.CaptureFixture[str]) -> None:
    scripts = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"][
        "scripts"
    ]
    assert scripts == {"goc": "goc_deploy.cli.goc:main"} | {
        f"goc-{name}": f"goc_deploy.cli.{name}:main" for name in COMMANDS
    }
    context = command.make_context("goc", ["run"])
    for name in COMMANDS:
        module = import_module(f"goc_deploy.cli.{name}")
        assert (
            command.get_command(context, name)
            is module.command
            is command.get_command(context, f"goc-{name}")
        )
        assert module.main(["-h"]) == main([name, "--help"]) == 0
        own, grouped = capsys.readouterr().out.split("Usage: ")[1:]
        assert own.removeprefix(f"goc-{name}") == grouped.removeprefix(f"goc {name}")


def test_the_commands_are_listed_without_being_imported() -> None:
    code = f"""import sys
from goc_deploy.cli.goc import main
main(["--help"])
commands = ["goc_deploy.cli." + name for name in {list(COMMANDS)}]
print("imported", [name for name in [*{HEAVY}, *commands] if name in sys.modules])"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert all(f"  {name} " in done.stdout for name in COMMANDS)
    assert done.stdout.rstrip().endswith("imported []")


def test_a_command_that_does_not_exist_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["paint"]) == 2
    assert "No such command 'paint'" in capsys.readouterr().err


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--version"]) == main(["--version"]) == 0
    assert capsys.readouterr().out == f"goc {__version__}\n" * 2


def test_tests_run_the_module_where_no_command_is_installed(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(conftest, "BIN", tmp_path)
    assert command_words("goc") == [sys.executable, "-m", "goc_deploy"]
    assert command_words("goc-run") == [sys.executable, "-m", "goc_deploy", "run"]
    done: subprocess.CompletedProcess[str] = command("goc-run", "--help", cwd=tmp_path)
    assert done.stdout.startswith("Usage: goc run")


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("name", COMMANDS)
def test_the_module_of_a_command_runs_it(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [f"goc-{name}", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"goc_deploy.cli.{name}", run_name="__main__")
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"Usage: goc-{name} ")
