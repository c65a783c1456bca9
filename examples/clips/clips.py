"""Clips of a digit that moves, and the prompts that describe them."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1] / "mnist"))
sys.path.append(str(Path(__file__).resolve().parents[1] / "emoji"))
from autoencoder import encoded
from captions import normalised
from train_prompts import DIGITS
from training import HERE as MNIST

FRAMES, SIDE = 8, 32
TRAVEL = 0.4  # half the way of a digit that drifts, in half widths of the picture
TURN = 0.9  # half the angle of a digit that turns, in radians
STILL_SCALE = 1.1  # of a digit that keeps its size
SCALES = (1.5, 0.8)  # of a digit that grows, at its ends; larger numbers are smaller digits
MOTIONS = (
    "stays still",
    "drifts left",
    "drifts right",
    "drifts up",
    "drifts down",
    "turns left",
    "turns right",
    "grows",
    "shrinks",
)
TEMPLATES = ("{digit} {motion}", "a {digit} that {motion}", "the number {digit} {motion}")


def prompt_of(digit: int, motion: int, draw: random.Random) -> str:
    """A random sentence about a clip."""
    return draw.choice(TEMPLATES).format(digit=DIGITS[digit], motion=MOTIONS[motion])


def words() -> list[str]:
    """Every word of the prompts, as the tokenizer reads it."""
    texts = [template.format(digit="", motion="") for template in TEMPLATES]
    return sorted({w for text in (*texts, *MOTIONS, *DIGITS) for w in normalised(text).split()})


def moved(images: Tensor, motions: Tensor) -> Tensor:
    """Clips (N, F, 1, S, S) of digits (N, 1, 28, 28), background -1.

    Args:
        images: digits in [-1, 1].
        motions: (N,) int64, index into `MOTIONS`.
    """
    margin = (SIDE - images.shape[-1]) // 2
    canvas = F.pad(images + 1, [margin] * 4)  # the background is zero, so that nothing drags edges
    way = torch.linspace(-1, 1, FRAMES)
    frames = []
    for at in way.tolist():
        matrices = torch.zeros(len(images), 2, 3)
        for i, motion in enumerate(motions.tolist()):
            matrices[i] = _transform(MOTIONS[motion], at)
        grid = F.affine_grid(matrices, list(canvas.shape), align_corners=False)
        frames.append(F.grid_sample(canvas, grid, align_corners=False) - 1)
    return torch.stack(frames, dim=1)


def _transform(motion: str, at: float) -> Tensor:
    """From places in the picture to places in the digit, at -1..1 of the way."""
    angle = {"turns left": -TURN, "turns right": TURN}.get(motion, 0.0) * at
    cos, sin = float(torch.cos(torch.tensor(angle))), float(torch.sin(torch.tensor(angle)))
    small, large = SCALES
    middle, spread = (small + large) / 2, (large - small) / 2
    scale = {"grows": middle + spread * at, "shrinks": middle - spread * at}.get(
        motion, STILL_SCALE
    )
    x = {"drifts left": TRAVEL, "drifts right": -TRAVEL}.get(motion, 0.0) * at
    y = {"drifts up": TRAVEL, "drifts down": -TRAVEL}.get(motion, 0.0) * at
    return torch.tensor([[scale * cos, scale * sin, x], [-scale * sin, scale * cos, y]])


def latents_of_clips(images: Tensor, labels: Tensor, clips: int, seed: int) -> dict[str, Tensor]:
    """Random clips as latents of the digits' VAE.

    Returns:
        ``latents`` (N, 4, F, S/4, S/4) float16, ``digits`` (N,) and ``motions`` (N,).
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(images), (clips,), generator=generator)
    motions = torch.randint(len(MOTIONS), (clips,), generator=generator)
    parts = []
    for first in range(0, clips, 100):
        part = slice(first, first + 100)
        pixels = moved(images[chosen[part]], motions[part]).flatten(0, 1)
        latents = encoded(MNIST / "vae", pixels).unflatten(0, (-1, FRAMES))
        parts.append(latents.transpose(1, 2).half())
    return {"latents": torch.cat(parts), "digits": labels[chosen], "motions": motions}
