"""The shipped models of VAE latents draw digits that a classifier reads.

One draws by class, one by prompt.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import MNIST, Command
from tests.reference import relative_l2

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LABELS = ",".join(str(digit) for digit in range(10))
VAE = ("--vae", MNIST / "vae", "--num-heads", 4)
PLANS = ("--plan", "none", "--plan", "fora:2")


@pytest.fixture(scope="module")
def latent_engine(tmp_path_factory: pytest.TempPathFactory, command: Command) -> Path:
    """A DiT on latents, and the VAE that they belong to."""
    directory = tmp_path_factory.mktemp("latent") / "engine"
    more = ("--plan", "fora:2+gc:1.0", "--max-batch", 50)
    command("goc-export", MNIST / "latent_dit_mnist.pt", "-o", directory, *VAE, *PLANS, *more)
    return directory


@pytest.fixture(scope="module")
def prompt_engine(tmp_path_factory: pytest.TempPathFactory, command: Command) -> Path:
    """A PixArt on latents, with VAE and text encoder."""
    directory = tmp_path_factory.mktemp("prompts") / "engine"
    texts = ("--text-encoder", MNIST / "text_encoder", "--captions", MNIST / "prompts.txt")
    more = ("--plan", "fora:2+goc", "--sampler", "dpm++", "--max-batch", 50)
    command("goc-export", MNIST / "pixart_mnist.pt", "-o", directory, *VAE, *PLANS, *texts, *more)
    return directory


def agreement(samples: Path) -> float:
    """Share of the samples that the classifier reads as 0, 1, ..., 9, 0, ..."""
    with np.load(samples) as found:
        assert found["arr_0"].shape[1:] == (28, 28, 3)
    words = [sys.executable, MNIST / "score.py", samples, "--labels", LABELS, "--minimum", 0]
    score = subprocess.run(
        [str(word) for word in words], capture_output=True, text=True, timeout=120, check=True
    )
    return float(re.search(r"agreement ([\d.]+)", score.stdout)[1])


@pytest.mark.parametrize(
    ("asked", "gradient"), [("labels", "fora:2+gc:1.0"), ("prompts", "fora:2+goc")]
)
def test_digits_are_read_and_the_gradient_stays_closer_than_plain_reuse(
    asked: str, gradient: str, request: pytest.FixtureRequest, command: Command, tmp_path: Path
) -> None:
    by_label = asked == "labels"
    engine = request.getfixturevalue("latent_engine" if by_label else "prompt_engine")
    what = (
        ("--labels", LABELS)
        if by_label
        else [word for digit in DIGITS for word in ("--prompt", f"a {digit}")]
    )
    latents = {}
    for plan in ("none", "fora:2", gradient):
        samples, path = tmp_path / f"{plan}.npz", tmp_path / f"{plan}.npy"
        kept = ("--output", samples, "--latents-output", path)
        command("goc-run", engine, "--plan", plan, *what, "--num-images", 50, "--seed", 7, *kept)
        assert agreement(samples) >= 0.9
        latents[plan] = np.load(path)
    assert latents["none"].shape == (50, 4, 7, 7)
    errors = {plan: relative_l2(found, latents["none"]) for plan, found in latents.items()}
    assert 0 < errors[gradient] < errors["fora:2"] < 0.3


def test_a_prompt_is_read_however_it_is_asked_and_not_what_it_does_not_say(
    prompt_engine: Path, command: Command, tmp_path: Path
) -> None:
    asked, other = tmp_path / "asked.npz", tmp_path / "other.npz"
    prompts = [word for digit in DIGITS for word in ("--prompt", f"Draw the number {digit}  ")]
    command(
        "goc-run", prompt_engine, "--plan", "none", *prompts, "--num-images", 50, "--output", asked
    )
    assert agreement(asked) >= 0.85
    command(
        "goc-run",
        prompt_engine,
        "--plan",
        "none",
        "--prompt",
        "a two",
        "--num-images",
        20,
        "--output",
        other,
    )
    assert agreement(other) <= 0.2
