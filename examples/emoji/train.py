"""Train the PixArt of this example and its text encoder on pictures.npz.

The training may take as many sessions as it needs.

    python examples/emoji/train.py --resume  # until it is stopped
    python examples/emoji/train.py --resume --decay-steps 20000  # the last steps, rates fall

Everything is in one folder outside the repository: ``checkpoint.pt`` with the whole state, written
every few minutes and when the process is asked to stop, and ``pipeline/``, which goc-export reads.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from captions import (
    CAPTIONS,
    Captions,
    normalised,
    random_prompt,
    read_captions,
    token_rows,
    tokenizer_of_words,
    vocabulary,
)
from model import SPEC, save_pipeline, text_settings
from prompted import PromptedPixArt
from resumable import (
    CHECKPOINT,
    descend,
    parsed,
    restore,
    resumable_parser,
    run,
    start,
    state_of,
    write_state,
)
from text_training import train_text_encoder
from torch import Tensor
from training import (
    CONDITION_DROPOUT,
    Optimizer,
    signal_levels,
    spread_timesteps,
)

HERE = Path(__file__).resolve().parent
FOLDER = Path("~/.cache/goc_deploy/emoji")
PIPELINE = "pipeline"
WEIGHT_CAP = 5.0


def load_pictures(path: Path, names: Sequence[str]) -> Tensor:
    """Pictures (N, 3, H, W) float32 in [-1, 1], in the order of the captions.

    Raises:
        ValueError: the file is of other emoji than the captions.
    """
    with np.load(path) as arrays:
        found, images = arrays["names"].tolist(), arrays["images"]
    if found != list(names):
        raise ValueError(f"{path} and {CAPTIONS} are not of the same emoji; run render_pictures.py")
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


class Training:
    """The whole state of a training.

    It is a model, the average of its weights, its optimizer and random numbers: what a checkpoint
    keeps.
    """

    def __init__(
        self, args: argparse.Namespace, captions: Sequence[Captions], pictures: Tensor
    ) -> None:
        words = vocabulary({str(i): entry for i, entry in enumerate(captions)})
        torch.manual_seed(args.seed)
        self.args, self.captions = args, captions
        self.tokenizer, self.draw = tokenizer_of_words(words), random.Random(args.seed)
        self.device = torch.device(args.device)
        self.noise = torch.Generator(self.device).manual_seed(args.seed)
        self.pictures, self.alphas = pictures.to(self.device), signal_levels().to(self.device)
        spec = replace(SPEC, depth=args.depth, grid=pictures.shape[-1] // SPEC.patch)
        self.model = PromptedPixArt(spec, text_settings(len(words))).to(self.device)
        self.model.text_encoder.requires_grad_(False)
        self.average = copy.deepcopy(self.model)
        self.optimizer = Optimizer(self.model, args.adam_rate, args.muon_rate, args.bf16)
        self.predict = torch.compile(self.model) if args.compile else self.model
        self.step = 0
        texts = [[normalised(text) for text in entry.train] for entry in captions]
        trained = repr(("sample", texts))
        self.trained = hashlib.sha256(trained.encode()).hexdigest()

    def train_text(self) -> None:
        """Train the text encoder; it stays as it is from here on."""
        encoder = self.model.text_encoder.requires_grad_(True)
        train_text_encoder(
            encoder, self.tokenizer, self.captions, self.pictures, self.args.text_steps, self.draw
        )
        encoder.requires_grad_(False)
        self.average.text_encoder.load_state_dict(encoder.state_dict())

    def take_step(self, factor: float) -> float:
        """One update at this factor of the learning rates; returns the loss.

        The model learns the clean picture (Li and He, "Back to Basics: Let Denoising Generative
        Models Denoise", arXiv:2511.13720): a patch of noise has as many dimensions as the model is
        wide, a patch of the pictures fewer. The weight of the loss is that of the velocity
        (Salimans and Ho, "Progressive Distillation for Fast Sampling of Diffusion Models", ICLR
        2022), 1 + SNR, with a cap, so that the nearly clean timesteps do not rule.
        """
        chosen = [self.draw.randrange(len(self.captions)) for _ in range(self.args.batch)]
        prompts = [
            ""
            if self.draw.random() < CONDITION_DROPOUT
            else random_prompt(self.captions[i], self.draw)
            for i in chosen
        ]
        tokens = torch.tensor(token_rows(self.tokenizer, prompts)).to(self.device)
        images = self.pictures[chosen]
        t = spread_timesteps(len(chosen)).to(self.device)
        noise = torch.randn(images.shape, generator=self.noise, device=self.device)
        alpha = self.alphas[t][:, None, None, None]
        signal, spread = alpha.sqrt(), (1 - alpha).sqrt()
        noisy = signal * images + spread * noise
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.bf16):
            predicted = self.predict(noisy, t.float(), tokens)
        weight = (1 / (1 - alpha)).clamp(max=WEIGHT_CAP)
        loss = (weight * (predicted.float() - images).square()).mean()
        return descend(self, loss, factor)

    def save(self) -> None:
        """Write the whole state, and the averaged weights for goc-export.

        Readers see the old files or the new ones.
        """
        path = self.args.folder / CHECKPOINT
        version, numbers, gauss = self.draw.getstate()
        state: dict[str, Any] = {
            **state_of(self),
            "trained": self.trained,
            "torch_rng": torch.get_rng_state(),
            "noise_rng": self.noise.get_state(),
            "device": self.device.type,
            "python_rng": [version, list(numbers), gauss],
        }
        write_state(state, path)
        save_pipeline(self.average, self.tokenizer, self.args.folder / PIPELINE)

    def restore(self) -> None:
        """Go on from the checkpoint.

        Raises:
            ValueError: it was trained with other captions, whose words have other numbers, or to
                predict something else.
        """
        path = self.args.folder / CHECKPOINT
        state = torch.load(path, map_location=self.device, weights_only=True)
        if state["trained"] != self.trained:
            raise ValueError(
                f"{path} was trained with other captions than {CAPTIONS}, or by another version of "
                "this script; choose another --folder"
            )
        restore(self, state)
        torch.set_rng_state(state["torch_rng"].cpu())
        if state["device"] == self.device.type:
            self.noise.set_state(state["noise_rng"].cpu())
        else:  # the two kinds of device have different states
            self.noise.manual_seed(self.args.seed + self.step)
        version, numbers, gauss = state["python_rng"]
        self.draw.setstate((version, tuple(numbers), gauss))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = resumable_parser(__doc__.splitlines()[0], FOLDER)
    parser.add_argument("--pictures", type=Path, default=HERE / "pictures.npz")
    parser.add_argument(
        "--text-steps",
        type=int,
        default=400,
        help="of the text encoder, before the first step (default %(default)s)",
    )
    parser.add_argument(
        "--depth", type=int, default=SPEC.depth, help="blocks (default %(default)s)"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    return parsed(parser, argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    captions = read_captions()
    training = Training(args, list(captions.values()), load_pictures(args.pictures, list(captions)))
    if not start(training):
        training.train_text()
    run(training, "images")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
