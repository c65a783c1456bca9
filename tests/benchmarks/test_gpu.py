"""The program that measures on a GPU, as far as it needs none.

`make bench-gpu DRY=1` runs all of it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.on_gpu import exports, ready
from benchmarks.on_gpu.machine import machine

ROOT = Path(__file__).parents[2]


def test_without_a_gpu_it_ends_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu.main(["--work", str(tmp_path), "--output", str(tmp_path / "report")]) == 5
    assert "there is no nvidia-smi, so no NVIDIA GPU here" in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


def test_the_card_the_driver_and_the_versions_are_read_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "nvidia-smi"
    script.write_text(
        '#!/bin/sh\ncase "$1" in --query-gpu*) echo "NVIDIA H100 80GB HBM3, 580.1, 9.0, 81559";;\n'
        '*) echo "| Driver Version: 580.1  CUDA Version: 13.0 |";; esac\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    found = machine(dry=False)
    assert (found["card"], found["driver"], found["cuda"]) == (
        "NVIDIA H100 80GB HBM3",
        "580.1",
        "13.0",
    )
    assert (found["compute_capability"], found["memory_mb"]) == ("9.0", 81559)
    assert {"python", "goc_deploy", "numpy"} <= found["versions"].keys()


def test_the_command_is_recorded_without_folders() -> None:
    args = argparse.Namespace(
        model="XL/2",
        seconds=345.0,
        backend=["onnxruntime-cuda"],
        no_cuda_graphs=True,
        dry=False,
        work="/x",
    )
    expected = (
        "python benchmarks/gpu.py --model XL/2 --seconds 345 --backend onnxruntime-cuda "
        "--no-cuda-graphs"
    )
    assert gpu.command(args) == expected


def test_engines_are_kept_by_the_sources_that_make_them() -> None:
    folder = exports.engines_folder(Path("work"))
    assert folder == exports.engines_folder(Path("work"))
    assert folder.parent == Path("work")
    assert exports.DIT.checkpoint(folder) == folder / "XL-2.pt"
    assert exports.DRY.checkpoint(folder).exists()


def test_what_this_python_lacks_is_named_in_a_sentence() -> None:
    assert ready.missing("bench-gpu") == {}
    done = subprocess.run(
        [sys.executable, "-I", "-S", ROOT / "benchmarks/on_gpu/ready.py", "test-gpu"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 5
    assert "cannot import goc_deploy, onnxruntime, pytest" in done.stderr
    assert "make test-gpu PYTHON=... or VENV=..." in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_first_paragraph_of_the_documentation_names_every_card_that_was_measured() -> None:
    first = (ROOT / "docs/gpu.md").read_text().split("\n\n")[1]
    cards = {
        json.loads(path.read_text())["machine"]["card"]
        for path in (ROOT / "docs/gpu").glob("*[0-9].json")
    }
    assert ("Nothing here has run on a GPU yet" in first) == (not cards)
    for card in cards:
        assert card in first
