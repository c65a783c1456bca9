"""What goc-run leaves in files: dated pictures, directories that grow, and runs that go on."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
from PIL import Image

from tests.conftest import Command, command_words

SERIES = ("--num-images", 6, "--seed", 3, "--batch-size", 2)


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_spec_and_a_step_count_are_compiled_for_one_run(
    demo_engine: Path, command: Command, tmp_path: Path
) -> None:
    before = files_below(demo_engine)
    words = ("--labels", "1,2", "--latents-output")
    for plan, steps, name in (("fora:3+lagrange:1", 12, "unlisted"), ("fora-2", 12, "steps")):
        out, report = tmp_path / f"{name}.npy", tmp_path / f"{name}.json"
        command(
            "goc-run",
            demo_engine,
            "--plan",
            plan,
            "--num-inference-steps",
            steps,
            *words,
            out,
            "--report",
            report,
        )
        assert json.loads(report.read_text())["steps"] == 12
    assert json.loads((tmp_path / "unlisted.json").read_text())["step_kinds"] == {
        "collapsed": 8,
        "full": 4,
    }
    assert files_below(demo_engine) == before
    engine = Path(shutil.copytree(demo_engine, tmp_path / "engine"))
    command("goc-plan", engine, "fora:3+lagrange:1", "--steps", 12)
    command("goc-run", engine, "--plan", "fora:3+lagrange:1", *words, tmp_path / "listed.npy")
    np.testing.assert_array_equal(
        np.load(tmp_path / "unlisted.npy"), np.load(tmp_path / "listed.npy")
    )
    done = command(
        "goc-run",
        demo_engine,
        "--plan",
        "fora:2+goc",
        "--steps",
        10,
        *words,
        tmp_path / "x.npy",
        code=2,
    )
    assert (
        f"must be added to the engine directory first, with: goc plan {demo_engine} fora:2+goc "
        "--steps 10" in done.stderr
    )
    assert not (tmp_path / "x.npy").exists()


def pixels(folder: Path) -> dict[str, np.ndarray]:
    found = {}
    for path in sorted(folder.iterdir()):
        with Image.open(path) as picture:
            found[path.name] = np.asarray(picture)
    return found


def test_a_run_without_an_output_writes_a_dated_picture(
    demo_engine: Path, command: Command, tmp_path: Path
) -> None:
    done = command("goc-run", demo_engine, "--labels", "1,2", cwd=tmp_path)
    (path,) = tmp_path.iterdir()
    assert done.stdout == f"{path.name}\n"
    assert re.fullmatch(r"goc-\d{8}-\d{6}\.png", path.name)


def test_a_run_that_was_interrupted_goes_on_where_it_stopped(
    demo_engine: Path, command: Command, tmp_path: Path
) -> None:
    words = ("goc-run", demo_engine, *SERIES, "--plan", "fora:2", "--output")
    report = tmp_path / "report.json"
    command(*words, tmp_path / "whole", "--report", report)
    assert len(json.loads(report.read_text())["batches"]) == 3
    process = subprocess.Popen(
        [
            *command_words("goc-run"),
            *map(str, (*words[1:], tmp_path / "parts" / "x", "--num-images", 400)),
        ],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # a shell's background jobs have it ignored
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "parts" / "x" / "0002.png").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    kept = pixels(tmp_path / "parts" / "x")
    assert list(kept) == [f"{i:04d}.png" for i in range(len(kept))]
    for extra in list(kept)[3:]:
        (tmp_path / "parts" / "x" / extra).unlink()
    done = command(*words, tmp_path / "parts" / "x", "--resume")
    assert done.stderr.splitlines()[-1].startswith("3 images with plan fora-2")
    whole, parts = pixels(tmp_path / "whole"), pixels(tmp_path / "parts" / "x")
    assert list(whole) == list(parts) == [f"{i:04d}.png" for i in range(6)]
    for name in whole:
        assert np.abs(whole[name].astype(int) - parts[name]).max() <= 1, (
            name
        )  # other batches, other rounding
    assert "all 6 images are there" in command(*words, tmp_path / "parts" / "x", "--resume").stderr
    done = command(*words, tmp_path / "parts" / "x", "--resume", "--cfg-scale", 2, code=8)
    assert "0000.png was made with cfg_scale 4.0, not 2.0" in done.stderr
