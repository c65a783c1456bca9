"""Train the small class-conditional DiT of this example on MNIST digits: pixels, or VAE latents.

The training may take as many sessions as it needs.

    python examples/mnist/train_dit.py --resume  # until it is stopped
    python examples/mnist/train_dit.py --resume --decay-steps 2000  # the last steps, rates fall

Everything is in one folder outside the repository: ``checkpoint.pt``, and ``dit.pt`` with the
averaged weights, which goc-export reads.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from autoencoder import encoded
from resumable import ResumableTraining, parsed, resumable_parser
from torch import Tensor, nn
from training import HERE, initialise, load_digits, noise_losses, save, signal_levels

from goc_deploy.exporters.architectures.dit_model import DiT
from goc_deploy.spec import ModelSpec

FOLDER = Path("~/.cache/goc_deploy/digits")
WEIGHTS = "dit.pt"
PIXELS = ModelSpec(
    depth=8,
    hidden=128,
    heads=4,
    mlp_hidden=512,
    patch=4,
    grid=7,
    channels=1,
    choices=10,
    learn_sigma=False,
)
LATENTS = replace(PIXELS, depth=6, hidden=96, mlp_hidden=384, patch=1, channels=4)


class TrainedDiT(DiT):
    """A DiT with initial weights; with adaLN-Zero every block starts as the identity."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        self.null_condition = spec.choices
        initialise(self, lambda name: "adaLN_modulation" in name or name == "final_layer.linear")
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)


class Training(ResumableTraining):
    """Of a DiT that learns to predict the noise of digits."""

    def __init__(
        self, args: argparse.Namespace, spec: ModelSpec, images: Tensor, labels: Tensor
    ) -> None:
        torch.manual_seed(args.seed)
        super().__init__(args, TrainedDiT(spec))
        self.images, self.labels, self.alphas = images, labels, signal_levels()

    def loss(self) -> Tensor:
        """The weighted loss of a random batch."""
        chosen = torch.randint(len(self.images), (self.args.batch,))
        null = self.model.null_condition
        given = self.images[chosen], self.labels[chosen]
        return noise_losses(self.predict, null, *given, self.alphas)[0]

    def write_weights(self) -> None:
        """Write the averaged weights for goc-export."""
        save(self.average.state_dict(), self.args.folder / WEIGHTS)


def main(argv: Sequence[str] | None = None) -> int:
    parser = resumable_parser(__doc__.splitlines()[0], FOLDER)
    parser.add_argument("--data", type=Path, default=HERE / "mnist10k.npz")
    parser.add_argument("--vae", type=Path, help="folder of train_vae.py, to train on its latents")
    args = parsed(parser, argv)
    images, labels = load_digits(args.data)
    if args.vae:
        images = encoded(args.vae, images)
    training = Training(args, LATENTS if args.vae else PIXELS, images, labels)
    training.start()
    training.run("images")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
