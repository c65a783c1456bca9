"""Train the PixArt of this example and its text encoder on pictures.npz.

The training may take as many sessions as it needs.

    python examples/emoji/train.py --resume  # until it is stopped
    python examples/emoji/train.py --resume --decay-steps 20000  # the last steps, rates fall

Everything is in one folder outside the repository: ``checkpoint.pt`` with the whole state, written
every few minutes and when the process is asked to stop, and ``pipeline/``, which goc-export reads.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from captions import (
    CAPTIONS,
    Captions,
    normalised,
    random_prompts,
    read_captions,
    token_rows,
    tokenizer_of_words,
    vocabulary,
)
from model import SPEC, save_pipeline, text_settings
from pictures import load_pictures
from prompted import PromptedPixArt
from resumable import ResumableTraining, parsed, resumable_parser
from text_training import train_text_encoder
from torch import Tensor
from training import (
    CONDITION_DROPOUT,
    signal_levels,
    spread_timesteps,
)

HERE = Path(__file__).resolve().parent
FOLDER = Path("~/.cache/goc_deploy/emoji")
PIPELINE = "pipeline"
WEIGHT_CAP = 5.0


class Training(ResumableTraining):
    """Of a PixArt that reads prompts with a text encoder, which is trained before.

    A checkpoint has the random numbers too, so that several sessions make one training.
    """

    def __init__(
        self, args: argparse.Namespace, captions: Sequence[Captions], pictures: Tensor
    ) -> None:
        words = vocabulary({str(i): entry for i, entry in enumerate(captions)})
        torch.manual_seed(args.seed)
        self.captions, self.tokenizer = captions, tokenizer_of_words(words)
        self.device = torch.device(args.device)
        self.noise = torch.Generator(self.device).manual_seed(args.seed)
        self.pictures, self.alphas = pictures.to(self.device), signal_levels().to(self.device)
        spec = replace(SPEC, depth=args.depth, grid=pictures.shape[-1] // SPEC.patch)
        model = PromptedPixArt(spec, text_settings(len(words))).to(self.device)
        model.text_encoder.requires_grad_(False)
        super().__init__(args, model)
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

    def loss(self) -> Tensor:
        """The loss of a random batch.

        The model learns the clean picture (Li and He, "Back to Basics: Let Denoising Generative
        Models Denoise", arXiv:2511.13720): a patch of noise has as many dimensions as the model is
        wide, a patch of the pictures fewer. The weight of the loss is that of the velocity
        (Salimans and Ho, "Progressive Distillation for Fast Sampling of Diffusion Models", ICLR
        2022), 1 + SNR, with a cap, so that the nearly clean timesteps do not rule.
        """
        chosen = [self.draw.randrange(len(self.captions)) for _ in range(self.args.batch)]
        prompts = random_prompts([self.captions[i] for i in chosen], CONDITION_DROPOUT, self.draw)
        tokens = torch.tensor(token_rows(self.tokenizer, prompts)).to(self.device)
        images = self.pictures[chosen]
        t = spread_timesteps(len(chosen)).to(self.device)
        noise = torch.randn(images.shape, generator=self.noise, device=self.device)
        alpha = self.alphas[t][:, None, None, None]
        signal, spread = alpha.sqrt(), (1 - alpha).sqrt()
        predicted: Tensor = self.predict(signal * images + spread * noise, t.float(), tokens)
        weight = (1 / (1 - alpha)).clamp(max=WEIGHT_CAP)
        return (weight * (predicted.float() - images).square()).mean()

    def write_weights(self) -> None:
        """Write the averaged weights of both models for goc-export."""
        save_pipeline(self.average, self.tokenizer, self.args.folder / PIPELINE)

    def own_state(self) -> dict[str, Any]:
        """What was trained, and the random numbers."""
        version, numbers, gauss = self.draw.getstate()
        return {
            "trained": self.trained,
            "torch_rng": torch.get_rng_state(),
            "noise_rng": self.noise.get_state(),
            "device": self.device.type,
            "python_rng": [version, list(numbers), gauss],
        }

    def restore_own(self, state: Mapping[str, Any]) -> None:
        """Go on with the random numbers of a checkpoint.

        Raises:
            ValueError: it was trained with other captions, whose words have other numbers, or to
                predict something else.
        """
        if state["trained"] != self.trained:
            raise ValueError(
                f"the checkpoint in {self.args.folder} was trained with other captions than "
                f"{CAPTIONS}, or by another version of this script; choose another --folder"
            )
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
    if not training.start():
        training.train_text()
    training.run("images")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
