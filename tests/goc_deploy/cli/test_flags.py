"""The library speaks of arguments, the commands of flags."""

from __future__ import annotations

import ast
import logging
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from goc_deploy.cli.flags import ARGUMENT, FLAGS, FlagFormatter, with_flags
from goc_deploy.cli.goc import COMMANDS
from tests.conftest import GOLDEN, Command

TREE = Path(__file__).parents[3]
WHOLE_COMMANDS = ("goc-plan --backend", " --steps ", " --local-dir ")  # in a command to run


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("give `num_heads`", "give --num-heads"),
        ("use `cfg_scale=1`, please", "use --cfg-scale 1, please"),
        ("`force=True` replaces it", "--force replaces it"),
        ("`EngineOptions.plugin=False`", "--no-plugin"),
        ("`EngineOptions.capabilities=9.0`: no", "--compute-capability 9.0: no"),
        ("`weights` or `EngineOptions.weight_mode=shared`", "--weights or --engine-weights shared"),
        ("the file `notes` and a ` b", "the file `notes` and a ` b"),
    ],
)
def test_a_message_names_flags_instead_of_arguments(message: str, expected: str) -> None:
    assert with_flags(message) == expected


def test_every_flag_of_a_message_is_a_flag_of_a_command() -> None:
    flags = {
        name
        for command in COMMANDS
        for option in import_module(f"goc_deploy.cli.{command}").command.params
        for name in (*option.opts, *option.secondary_opts)
    }
    assert {f"--{flag}" for flag in FLAGS.values()} <= flags


def texts() -> Iterator[tuple[Path, str]]:
    """Every string of the library that is no docstring."""
    for folder in ("goc_deploy", "exporters", "engines", "runtime"):
        for path in (TREE / folder).rglob("*.py"):
            if "cli" in path.parts or any(parent.is_symlink() for parent in path.parents):
                continue
            tree = ast.parse(path.read_text(encoding="utf-8"))
            statements = (node for node in ast.walk(tree) if isinstance(node, ast.Expr))
            docstrings = {id(node.value) for node in statements}
            for node in ast.walk(tree):
                if isinstance(node, ast.JoinedStr):
                    parts = (getattr(part, "value", None) for part in node.values)
                    yield path, "".join(p if isinstance(p, str) else "x" for p in parts)
                elif isinstance(node, ast.Constant) and id(node) not in docstrings:
                    yield path, str(node.value)


def test_the_library_names_arguments_and_no_flags() -> None:
    for path, text in texts():
        if path.name == "nvrtc.py" or "var(--" in text or any(w in text for w in WHOLE_COMMANDS):
            continue
        assert not re.search(r"(?<!\w)--[a-z]", text), (path, text)
        for argument in ARGUMENT.finditer(text):
            assert argument["name"] in FLAGS, (path, text)


def test_errors_and_logs_of_a_command_name_flags(command: Command, tmp_path: Path) -> None:
    export = ("goc-export", GOLDEN / "model.pt", "-o", tmp_path / "engine")
    assert "give --num-heads" in command(*export, code=3).stderr
    record = logging.LogRecord("x", logging.INFO, "", 0, "use `steps=%d`", (4,), None)
    assert FlagFormatter("%(levelname)s: %(message)s").format(record) == "INFO: use --steps 4"
