"""The clips of the moving digits."""

from __future__ import annotations

import importlib
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLE = Path(__file__).parents[2] / "examples" / "clips"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """Import a module of the example; nothing of it stays imported."""
    pytest.importorskip("tokenizers", reason="tokenizers comes with the text extra")
    monkeypatch.setattr(sys, "path", [str(EXAMPLE), *sys.path])
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(EXAMPLE.parent) in (getattr(sys.modules[name], "__file__", None) or ""):
            del sys.modules[name]


@pytest.fixture
def clips(example: Callable[[str], Any]) -> Any:
    return example("clips")


@pytest.mark.parametrize(
    ("motion", "axis", "sign"),
    [("drifts left", 3, -1), ("drifts right", 3, 1), ("drifts up", 2, -1), ("drifts down", 2, 1)],
)
def test_a_digit_drifts_where_its_prompt_says(
    clips: Any, motion: str, axis: int, sign: int
) -> None:
    places = centres(clips, motion, axis)
    assert (sign * places.diff() > 0.5).all()
    other = centres(clips, motion, 5 - axis)
    assert (other.diff().abs() < 0.1).all()


@pytest.mark.parametrize(("motion", "sign"), [("grows", 1), ("shrinks", -1), ("stays still", 0)])
def test_a_digit_changes_its_size_as_its_prompt_says(clips: Any, motion: str, sign: int) -> None:
    ink = (moved_square(clips, motion) + 1).sum(dim=(1, 2, 3))
    assert ((sign * ink.diff() > 0) | (sign == 0)).all()
    assert sign or torch.allclose(ink[0], ink[-1])


def test_the_tokenizer_knows_every_word_of_the_prompts(
    example: Callable[[str], Any], clips: Any
) -> None:
    captions = example("captions")
    tokenizer = captions.tokenizer_of_words(clips.words())
    draw = random.Random(0)
    for digit in range(10):
        for motion in range(len(clips.MOTIONS)):
            tokens = tokenizer.encode(clips.prompt_of(digit, motion, draw)).ids
            assert captions.UNKNOWN not in tokens


def moved_square(clips: Any, motion: str) -> torch.Tensor:
    """The frames (F, 1, S, S) of a square that moves."""
    square = torch.full((1, 1, 28, 28), -1.0)
    square[..., 10:18, 10:18] = 1.0
    frames: torch.Tensor = clips.moved(square, torch.tensor([clips.MOTIONS.index(motion)]))[0]
    assert frames.shape == (clips.FRAMES, 1, clips.SIDE, clips.SIDE)
    return frames


def centres(clips: Any, motion: str, axis: int) -> torch.Tensor:
    """The centre of the ink of each frame along an axis, in pixels."""
    ink = moved_square(clips, motion) + 1
    places = torch.arange(clips.SIDE).reshape([-1 if i == axis else 1 for i in range(4)])
    return (ink * places).sum(dim=(1, 2, 3)) / ink.sum(dim=(1, 2, 3))


def test_one_weighted_token_stands_for_all_places_behind_a_prompt(
    example: Callable[[str], Any], clips: Any
) -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers comes with the judges extra")
    train = example("train")
    torch.manual_seed(0)
    model = train.PromptedWan({**train.text_settings(len(clips.words())), **train.UMT5})
    for parameter in model.wan.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    rows = train.token_rows(train.tokenizer_of_words(clips.words()), ["two drifts left", ""])
    tokens = torch.tensor(rows)
    given = torch.randn(2, 4, clips.FRAMES, 8, 8), torch.tensor([100.0, 700.0])
    full = diffusers.WanTransformer3DModel.from_config(model.wan.config)
    full.load_state_dict(model.wan.state_dict())
    with torch.no_grad():
        short = model(*given, tokens)
        captions = model.text_encoder(tokens, (tokens != train.PAD).float())
        padding = (0, 0, 0, train.CAPTION_TOKENS - captions.shape[1])
        expected = full(*given, torch.nn.functional.pad(captions, padding)).sample
    assert (short - expected).norm() < 1e-5 * expected.norm()


def test_training_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason="diffusers comes with the judges extra")
    words = ["--folder", str(tmp_path), "--clips", "4", "--batch", "2", "--decay-steps", "1"]
    for more, step in (([], 1), (["--resume"], 2)):
        line = [sys.executable, str(EXAMPLE / "train.py"), *words, "--threads", "1", *more]
        done = subprocess.run(line, capture_output=True, text=True, timeout=600, check=False)
        assert f"stopped after step {step}" in done.stdout, done.stderr
    assert (tmp_path / "pipeline" / "text_encoder" / "tokenizer.json").exists()


def test_the_motion_of_a_clip_is_found_from_its_middle(
    example: Callable[[str], Any], clips: Any
) -> None:
    evaluate = example("evaluate")
    digits = torch.full((len(clips.MOTIONS), 1, 28, 28), -1.0)
    digits[..., 8:22, 10:14] = 1.0
    digits[..., 18:22, 10:20] = 1.0
    motions = torch.arange(len(clips.MOTIONS))
    assert (evaluate.motions_of(clips.moved(digits, motions)) == motions.numpy()).all()
