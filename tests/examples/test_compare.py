"""The comparison picture: what it shows is what the plans made, and logs stay free of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The modules of the script, imported as Python does that runs it."""
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    names = ("comparison_picture", "show")
    yield tuple(__import__(name) for name in names)
    for name in names:
        del sys.modules[name]


def comparison(modules: Any, channels: int) -> Any:
    """Two plans, whose second differs from the first by 10 in one pixel of the first image."""
    picture = modules[0]
    images = np.full((2, 6, 6, channels), 100, np.uint8)
    other = images.copy()
    other[0, 2, 3] += 10
    rows = (picture.Row("No cache", 2.0, images, 0.0), picture.Row("GOC", 1.0, other, 0.125))
    return picture.Comparison(rows, ("a fox", "a very long prompt about a fox"), "on a CPU")


@pytest.mark.parametrize("channels", [1, 3])
def test_differences_are_white_where_images_are_equal(modules: Any, channels: int) -> None:
    shown = comparison(modules, channels)
    assert shown.amplification == 32  # 255 of 6.45, the percentile of 71 zeros and a 10
    differences = shown.differences(shown.rows[1])
    assert differences.shape == (2, 6, 6, 3)
    assert (differences[0, 2, 3] < 255).all()
    differences[0, 2, 3] = 255
    assert (differences == 255).all()
    assert shown.speed_up(shown.rows[1]) == 2


def test_equal_images_have_no_amplification(modules: Any) -> None:
    shown = comparison(modules, 1)
    same = modules[0].Comparison((shown.rows[0], shown.rows[0]), (), "")
    assert same.amplification == 1


@pytest.mark.parametrize("channels", [1, 3])
def test_the_card_is_opaque_between_round_transparent_corners(modules: Any, channels: int) -> None:
    card = modules[0].draw(comparison(modules, channels))
    alpha = np.asarray(card)[..., 3]
    assert alpha[0, 0] == alpha[-1, -1] == 0
    assert (alpha[30:-30] == 255).all()


def test_videos_are_animated_with_one_amplification(modules: Any, tmp_path: Path) -> None:
    picture = modules[0]
    images = np.full((2, 3, 6, 6, 3), 100, np.uint8)
    images[:, 1] = 90  # equal frames would be merged
    other = images.copy()
    other[0, 2, 3, 3] += 10
    rows = (picture.Row("No cache", 2.0, images, 0.0), picture.Row("GOC", 1.0, other, 0.125))
    shown = picture.Comparison(rows, (), "on a CPU")
    frames = shown.frames
    assert [frame.amplification for frame in frames] == [shown.amplification] * 3
    assert [(frame.differences(frame.rows[1]) < 255).any() for frame in frames] == [0, 0, 1]
    picture.save(shown, tmp_path / "x.webp")
    with Image.open(tmp_path / "x.webp") as card:
        assert (card.n_frames, card.width) == (3, 880)


def test_a_terminal_shows_half_blocks_and_a_log_nothing(
    modules: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = comparison(modules, 1)
    modules[1].show_comparison(shown)
    assert capsys.readouterr().out == ""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLORTERM", "truecolor")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    modules[1].show_comparison(shown)
    out = capsys.readouterr().out
    assert "38;2;100;100;100" in out
    assert "2.0 x as fast" in out
    assert max(line.count("▀") for line in out.splitlines()) == 16


@pytest.mark.slow
def test_the_script_compares_plans_of_an_engine_directory(
    prompt_engine_small: Path, tmp_path: Path
) -> None:
    path = tmp_path / "comparison.png"
    words = [sys.executable, str(EXAMPLES / "compare.py"), str(prompt_engine_small)]
    words += ["--prompt", "a two", "--prompt", "a six", "--plan", "none", "--plan", "fora:2"]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "NO_COLOR": "1"}
    done = subprocess.run(
        [*words, "--rounds", "1", "--output", str(path)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{path}\n"
    with Image.open(path) as card:
        assert card.width == 1760
