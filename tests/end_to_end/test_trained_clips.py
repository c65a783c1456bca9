"""The shipped model of videos moves the digit that its prompt names, with and without cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import MNIST, Command
from tests.reference import relative_l2

CLIPS = MNIST.parent / "clips"
PLANS = ("none", "fora:2", "fora:2+gc:0.5")
# Prompt, axis along which the ink moves, sign.
DRIFTS = (
    ("a two that drifts left", 1, -1),
    ("seven drifts right", 1, 1),
    ("the number zero drifts up", 0, -1),
    ("a three that drifts down", 0, 1),
)
FRAMES, PIXELS = 8, 3  # that a digit moves at least, in half of the frames


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, command: Command) -> Path:
    """A Wan with the digits' VAE and a text encoder of its own."""
    directory = tmp_path_factory.mktemp("clips") / "engine"
    companions = ("--vae", MNIST / "vae", "--text-encoder", CLIPS / "pipeline" / "text_encoder")
    sizes = ("--size", "32x32", "--frames", FRAMES, "--max-batch", len(DRIFTS))
    plans = [word for plan in PLANS for word in ("--plan", plan)]
    command("goc-export", CLIPS / "pipeline", "-o", directory, *companions, *sizes, *plans)
    return directory


def centres(frames: list[Path]) -> np.ndarray:
    """The centre of the ink of each frame, (F, 2), row before column."""
    found = []
    for path in frames:
        with Image.open(path) as image:
            ink = np.asarray(image.convert("L"), float)
        rows, columns = np.indices(ink.shape)
        found.append([(rows * ink).sum() / ink.sum(), (columns * ink).sum() / ink.sum()])
    return np.array(found)


@pytest.mark.parametrize("plan", ["none", "fora:2+gc:0.5"])
def test_digits_drift_where_their_prompts_say(
    engine: Path, command: Command, tmp_path: Path, plan: str
) -> None:
    prompts = [word for prompt, _, _ in DRIFTS for word in ("--prompt", prompt)]
    more = ("--plan", plan, "--cfg-scale", 3, "--seed", 5, "--output", tmp_path / "frames")
    command("goc-run", engine, *prompts, "--num-images", len(DRIFTS), *more)
    frames = sorted(tmp_path.glob("frames-*/*.png"))
    assert len(frames) == FRAMES * len(DRIFTS)
    for i, (prompt, axis, sign) in enumerate(DRIFTS):
        way = centres(frames[i * FRAMES : (i + 1) * FRAMES])
        assert sign * (way[-1] - way[FRAMES // 2])[axis] > PIXELS, prompt
        assert sign * (way[FRAMES // 2] - way[0])[axis] > PIXELS, prompt


def test_plans_stay_close_to_no_cache(engine: Path, command: Command, tmp_path: Path) -> None:
    latents = {}
    for plan in PLANS:
        path = tmp_path / f"{plan}.npy"
        more = ("--plan", plan, "--cfg-scale", 3, "--latents-output", path)
        command("goc-run", engine, "--prompt", "four grows", "--num-images", 4, *more)
        latents[plan] = np.load(path)
    errors = {plan: relative_l2(found, latents["none"]) for plan, found in latents.items()}
    assert all(0 < errors[plan] < 0.25 for plan in PLANS[1:])
