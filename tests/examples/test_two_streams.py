"""The two-stream example: its shipped model draws what captions name, and its training goes on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import goc_deploy
from tests.reference import relative_l2

EXAMPLES = Path(__file__).parents[2] / "examples"
TWO_STREAMS, EMOJI = EXAMPLES / "two_streams", EXAMPLES / "emoji"
PLANS = ("none", "fora:2", "fora:2+gc:0.5")
NAMED = 12  # captions that are drawn
RIGHT = 10  # of them that are nearest to what they name, at least


def run(name: str, *words: object) -> str:
    """Run a script of the example; its output."""
    line = [sys.executable, str(TWO_STREAMS / name), *map(str, words)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def evaluate(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The score of the emoji example; nothing of it stays imported."""
    monkeypatch.setattr(sys, "path", [str(EMOJI), *sys.path])
    before = set(sys.modules)
    yield __import__("evaluate")
    for name in set(sys.modules) - before:
        if str(EXAMPLES) in (getattr(sys.modules[name], "__file__", None) or ""):
            del sys.modules[name]


def enlarged(images: np.ndarray, side: int) -> np.ndarray:
    return np.stack([np.asarray(Image.fromarray(image).resize((side, side))) for image in images])


def test_the_shipped_model_draws_what_captions_name(evaluate: Any, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers", reason="tokenizers comes with the text extra")
    captions = tmp_path / "captions.safetensors"
    assert "327 prompts" in run("prompts.py", captions)
    engine = tmp_path / "engine"
    more = {"caption_tokens": 16, "max_batch": NAMED}
    goc_deploy.export(
        TWO_STREAMS / "pipeline", engine, captions=captions, plans=list(PLANS), **more
    )
    latents = {}
    for plan in PLANS:
        with goc_deploy.load(engine, plan=plan) as pipe:
            result = pipe.generate(labels=list(range(NAMED)), seed=0, cfg_scale=3.0)
        latents[plan] = result.latents
        with np.load(EMOJI / "pictures.npz") as arrays:
            pictures = arrays["images"]
        assert result.images is not None
        found = evaluate.nearest(enlarged(result.images, pictures.shape[1]), pictures)
        assert (found == np.arange(NAMED)).sum() >= RIGHT, plan
    errors = {plan: relative_l2(found, latents["none"]) for plan, found in latents.items()}
    assert all(0 < errors[plan] < 0.1 for plan in PLANS[1:])


def test_training_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason="diffusers comes with the judges extra")
    words = ("--folder", tmp_path, "--batch", 2, "--threads", 1, "--decay-steps", 1)
    assert "stopped after step 1" in run("train.py", *words)
    assert "stopped after step 2" in run("train.py", *words, "--resume")
    assert (tmp_path / "pipeline" / "transformer" / "config.json").exists()
