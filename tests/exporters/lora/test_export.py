"""goc-export --lora, from files to the manifest and its table."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.errors import ModelError
from tests.conftest import GOLDEN, Command
from tests.exporters.lora.files import saved

STATE = torch.load(GOLDEN / "model.pt", weights_only=True)
LAYER = "blocks.0.attn.qkv"
CHANGED = {"onnx/block_00_attn.weights"}
OPTIONS = ("--num-heads", 4, "--plan", "none", "--steps", 2)


def lora(path: Path, size: float, seed: int = 0) -> Path:
    outputs, inputs = STATE[f"{LAYER}.weight"].shape
    generator = torch.Generator().manual_seed(seed)
    down, up = (torch.randn(shape, generator=generator) for shape in ((2, inputs), (outputs, 2)))
    return saved({f"{LAYER}.lora_A.weight": down, f"{LAYER}.lora_B.weight": size * up}, path)


def weights(directory: Path) -> dict[str, str]:
    files = EngineDir.open(directory).manifest.files
    return {file.path: file.sha256 for file in files if file.path.endswith(".weights")}


def record(directory: Path) -> list[tuple[str, float]]:
    return [(lora.file, lora.scale) for lora in EngineDir.open(directory).manifest.loras]


def test_loras_change_their_layers_and_are_recorded(
    golden_engine: Path, tmp_path: Path, command: Command
) -> None:
    files = {
        "zero": lora(tmp_path / "zero.safetensors", 0),
        "first": lora(tmp_path / "first.safetensors", 0.01),
        "second": lora(tmp_path / "second.safetensors", 0.01, seed=1),
    }

    def export(name: str, *loras: str) -> subprocess.CompletedProcess[str]:
        flags = [word for text in loras for word in ("--lora", text)]
        return command("goc-export", GOLDEN / "model.pt", "-o", tmp_path / name, *OPTIONS, *flags)

    export("zero", f"{files['zero']}")
    both = (f"{files['first']}:0.5", f"{files['second']}:-2")
    export("both", *both)
    engines = (golden_engine, tmp_path / "zero", tmp_path / "both")
    plain, zero, changed = map(weights, engines)
    assert zero == plain
    assert {path for path in plain if changed[path] != plain[path]} == CHANGED
    assert record(tmp_path / "zero") == [("zero.safetensors", 1.0)]
    assert sorted(record(tmp_path / "both")) == [
        ("first.safetensors", 0.5),
        ("second.safetensors", -2.0),
    ]
    digests = {
        EngineDir.open(engine).manifest.provenance["checkpoint_sha256"] for engine in engines
    }
    assert len(digests) == 3
    assert "is up to date" in export("both", *reversed(both)).stderr
    shown = command("goc-plan", tmp_path / "both", "--inspect").stdout
    assert "LoRAs merged into the weights" in shown
    assert "second.safetensors" in shown


def test_a_lora_that_does_not_fit_leaves_nothing(tmp_path: Path, command: Command) -> None:
    other = {f"blocks.9.attn.qkv.lora_{part}.weight": torch.ones(2, 2) for part in "AB"}
    file = saved(other, tmp_path / "other.safetensors")
    done = command(
        "goc-export",
        GOLDEN / "model.pt",
        "-o",
        tmp_path / "engine",
        *OPTIONS,
        "--lora",
        file,
        code=ModelError.exit_code,
    )
    assert "does not fit this dit" in done.stderr
    assert not (tmp_path / "engine").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["other.safetensors"]


@pytest.mark.parametrize("text", ["{}:0", "{}:big"])
def test_the_message_names_the_flag(text: str, tmp_path: Path, command: Command) -> None:
    file = lora(tmp_path / "lora.safetensors", 0.1)
    words = ("goc-export", GOLDEN / "model.pt", "-o", tmp_path / "engine", *OPTIONS)
    done = command(*words, "--lora", text.format(file), code=2)
    assert f"--lora {text.format(file)}: the scale must be" in done.stderr
