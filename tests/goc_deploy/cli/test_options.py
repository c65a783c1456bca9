"""Options that are the same in every command.

They are names from elsewhere, outputs, and completion by the shell.
"""

from __future__ import annotations

import json
import logging
from importlib import import_module
from pathlib import Path

import click
import pytest

from goc_deploy.cli.export import command as export_command
from goc_deploy.cli.goc import COMMANDS
from goc_deploy.cli.goc import main as goc
from goc_deploy.cli.options import Precision, sort_outputs
from goc_deploy.cli.run import main as goc_run
from goc_deploy.exporters.architectures.families import ARCHITECTURES

GIVEN = {(".json",): None, (".png", ".svg"): Path("x.png")}


def names(command: str) -> set[str]:
    return {
        name
        for option in import_module(f"goc_deploy.cli.{command}").command.params
        for name in option.opts
    }


def test_every_command_has_the_options_that_are_typed_by_habit() -> None:
    for command in COMMANDS:
        # A server writes no file, and every request has its own guidance scale.
        own = set() if command == "serve" else {"-o", "--output", "--cfg-scale", "--guidance-scale"}
        assert own | {"-v"} <= names(command), command
        settings = import_module(f"goc_deploy.cli.{command}").command.context_settings
        assert settings == {"show_default": True, "help_option_names": ["-h", "--help"]}
    for command in ("run", "serve", "bench", "eval"):
        assert {"--device", "--backend", "--threads"} <= names(command), command
    for command in ("export", "plan"):
        assert {"--steps", "--num-inference-steps"} <= names(command), command
    assert {"--precision", "--dtype"} <= names("export")


@pytest.mark.parametrize("name", ["fp16", "float16"])
def test_a_precision_has_two_names(name: str) -> None:
    assert Precision().convert(name, None, None) == "fp16"
    with pytest.raises(click.BadParameter, match="'float8' is not one of 'fp32', 'fp16', 'bf16'"):
        Precision().convert("float8", None, None)


def test_an_output_goes_to_the_option_that_writes_such_files() -> None:
    assert sort_outputs((), GIVEN) == [None, Path("x.png")]
    assert sort_outputs((Path("a.JSON"),), GIVEN) == [Path("a.JSON"), Path("x.png")]
    with pytest.raises(
        click.UsageError, match=r"-o a.html: its name must end in one of .json, .png, .svg"
    ):
        sort_outputs((Path("a.html"),), GIVEN)
    with pytest.raises(click.UsageError, match=r"-o a.svg: x.png is written already"):
        sort_outputs((Path("a.svg"),), GIVEN)


def completed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str
) -> list[str]:
    """What bash is offered for the last word."""
    monkeypatch.setenv("COMP_WORDS", " ".join(words))
    monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
    variable = f"_{words[0].replace('-', '_').upper()}_COMPLETE"
    monkeypatch.setenv(variable, "bash_complete")
    with pytest.raises(SystemExit):
        goc([]) if words[0] == "goc" else goc_run([])
    return [line.split(",")[1] for line in capsys.readouterr().out.splitlines() if line]


def test_a_shell_completes_commands_options_and_plans(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    plans = [{"name": name, "policy": name} for name in ("none", "fora-2", "fora-3")]
    (tmp_path / "manifest.json").write_text(json.dumps({"plans": plans}))
    assert completed(monkeypatch, capsys, "goc", "e") == ["export", "eval"]
    assert "--guidance-scale" in completed(monkeypatch, capsys, "goc-run", str(tmp_path), "--g")
    assert completed(monkeypatch, capsys, "goc-run", str(tmp_path), "--plan", "fo") == [
        "fora-2",
        "fora-3",
    ]
    assert completed(monkeypatch, capsys, "goc", "run", str(tmp_path), "--plan", "n") == ["none"]
    (tmp_path / "manifest.json").write_text("[]")
    assert completed(monkeypatch, capsys, "goc-run", str(tmp_path), "--plan", "fo") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_for_the_shell_is_printed(
    shell: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("_GOC_RUN_COMPLETE", f"{shell}_source")
    with pytest.raises(SystemExit) as end:
        goc_run([])
    assert end.value.code == 0
    assert "_GOC_RUN_COMPLETE" in capsys.readouterr().out


def test_verbose_shows_what_the_library_logs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(logging.getLogger("goc_deploy"), "level", logging.NOTSET)
    assert goc_run([str(tmp_path), "-v"]) == 4
    assert logging.getLogger("goc_deploy").isEnabledFor(logging.INFO)


@pytest.mark.parametrize("option", ["--output", "--latents-output", "--report"])
def test_a_name_that_is_not_utf8_is_refused_before_the_work(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert goc_run(["engine", option, "a\udcff.png"]) == 2
    assert r"'a\udcff.png' is not UTF-8" in capsys.readouterr().err
    for command in COMMANDS:
        assert goc([command, "a\udcff"]) == 2
        assert "is not UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--output", "--latents-output", "--report", "--latents"])
def test_a_name_with_a_null_byte_is_refused(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert goc_run(["engine", option, "a\0.png"]) == 2
    assert r"'a\x00.png' has a null byte" in capsys.readouterr().err
    for command in COMMANDS:
        assert goc([command, "a\0b"]) == 2
        assert "has a null byte" in capsys.readouterr().err


def test_every_architecture_can_be_named_at_export() -> None:
    (model,) = [option for option in export_command.params if option.name == "model"]
    assert isinstance(model.type, click.Choice)
    assert sorted(model.type.choices) == sorted(["auto", *ARCHITECTURES])
