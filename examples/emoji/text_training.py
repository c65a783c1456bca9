"""Train the text encoder alone, before the PixArt.

Each of its embeddings learns to tell which emoji the prompt names, and their mean also what that
emoji looks like. The PixArt then reads prompts from its first step on.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from captions import PAD, Captions, mixed_prompt, shared_words, token_rows
from tokenizers import Tokenizer
from torch import Tensor, nn
from training import GRADIENT_NORM

BATCH = 128
RATE, RATE_WARMUP = 3e-3, 30
LOG_EVERY = 50


def train_text_encoder(
    encoder: nn.Module,
    tokenizer: Tokenizer,
    captions: Sequence[Captions],
    pictures: Tensor,
    steps: int,
    draw: random.Random,
) -> None:
    """Train a text encoder to name the emoji of a prompt and to describe its picture.

    Args:
        encoder: a `T5Encoder`.
        tokenizer: of the prompts.
        captions: of all emoji.
        pictures: (N, 3, H, W), one per emoji.
        steps: updates.
        draw: source of the prompts.
    """
    described = principal_components(pictures, encoder.shared.weight.shape[1])
    width, count = described.shape[1], len(captions)
    name, describe = (nn.Linear(width, n).to(pictures.device) for n in (count, width))
    parameters = [*encoder.parameters(), *name.parameters(), *describe.parameters()]
    adam = torch.optim.AdamW(parameters, lr=RATE, betas=(0.9, 0.99), weight_decay=0.0)
    shared = shared_words(captions)
    for step in range(steps):
        adam.param_groups[0]["lr"] = RATE * min(1, (step + 1) / RATE_WARMUP) * (1 - step / steps)
        chosen = torch.tensor([draw.randrange(count) for _ in range(BATCH)])
        prompts = [mixed_prompt(captions[i], shared, draw) for i in chosen.tolist()]
        tokens = torch.tensor(token_rows(tokenizer, prompts)).to(pictures.device)
        chosen = chosen.to(pictures.device)
        embeddings, kept = encoder(tokens, (tokens != PAD).float()), (tokens != PAD).float()
        named = _mean(embeddings, kept)
        wanted = chosen[:, None].expand_as(tokens)
        each = F.cross_entropy(name(embeddings).transpose(1, 2), wanted, reduction="none")
        together = F.cross_entropy(name(named), chosen)
        error = (describe(named) - described[chosen]).square().mean()
        loss = together + (each * kept).sum() / kept.sum() + error
        adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(encoder.parameters(), GRADIENT_NORM)
        adam.step()
        if (step + 1) % LOG_EVERY == 0:
            print(
                f"text step {step + 1} cross entropy {together.item():.4f} picture {error:.4f}",
                flush=True,
            )


def principal_components(pictures: Tensor, count: int) -> Tensor:
    """Coordinates of pictures along their directions of largest variance: (N, count).

    They are scaled to a variance of 1 together. Directions beyond the number of pictures are 0.
    """
    flat = pictures.flatten(1)
    left, sizes, _ = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
    found = left[:, :count] * sizes[:count]
    return F.pad(found / found.std(), (0, count - found.shape[1]))


def _mean(embeddings: Tensor, kept: Tensor) -> Tensor:
    """The mean of the embeddings (B, L, C) of the kept tokens (B, L): (B, C)."""
    return (embeddings * kept[..., None]).sum(1) / kept.sum(1, keepdim=True)
