"""Train the small class-conditional DiT of this example on MNIST digits: pixels, or VAE latents.

The training may take as many sessions as it needs.

    python examples/mnist/train_dit.py --resume  # until it is stopped
    python examples/mnist/train_dit.py --resume --decay-steps 2000  # the last steps, rates fall

Everything is in one folder outside the repository: ``checkpoint.pt``, and ``dit.pt`` with the
averaged weights, which goc-export reads.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from autoencoder import encoded
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
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from training import HERE, Optimizer, initialise, load_digits, noise_losses, save, signal_levels

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


class Training:
    """The whole state of a training."""

    def __init__(
        self, args: argparse.Namespace, spec: ModelSpec, images: Tensor, labels: Tensor
    ) -> None:
        self.args, self.images, self.labels = args, images, labels
        torch.manual_seed(args.seed)
        self.model = TrainedDiT(spec)
        self.average = copy.deepcopy(self.model)
        self.optimizer = Optimizer(self.model, args.adam_rate, args.muon_rate, args.bf16)
        self.predict = torch.compile(self.model) if args.compile else self.model
        self.predict.null_condition = self.model.null_condition
        self.alphas, self.step = signal_levels(), 0

    def take_step(self, factor: float) -> float:
        """One update at this factor of the learning rates; returns the loss."""
        chosen = torch.randint(len(self.images), (self.args.batch,))
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=self.args.bf16),
            sdpa_kernel(SDPBackend.MATH),  # the fused attention is slow on few tokens
        ):
            loss, _ = noise_losses(
                self.predict, self.images[chosen], self.labels[chosen], self.alphas
            )
        return descend(self, loss, factor)

    def save(self) -> None:
        """Write the whole state, and the averaged weights for goc-export."""
        write_state(state_of(self), self.args.folder / CHECKPOINT)
        save(self.average.state_dict(), self.args.folder / WEIGHTS)

    def restore(self) -> None:
        """Go on from the checkpoint."""
        restore(self, torch.load(self.args.folder / CHECKPOINT, weights_only=True))
        torch.manual_seed(self.args.seed + self.step)


def main(argv: Sequence[str] | None = None) -> int:
    parser = resumable_parser(__doc__.splitlines()[0], FOLDER)
    parser.add_argument("--data", type=Path, default=HERE / "mnist10k.npz")
    parser.add_argument("--vae", type=Path, help="folder of train_vae.py, to train on its latents")
    args = parsed(parser, argv)
    images, labels = load_digits(args.data)
    if args.vae:
        images = encoded(args.vae, images)
    training = Training(args, LATENTS if args.vae else PIXELS, images, labels)
    start(training)
    run(training, "images")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
