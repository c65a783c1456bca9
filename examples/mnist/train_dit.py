"""Train the small class-conditional DiT of this example on MNIST digits, on a CPU.

It learns pixels, or the latents of a VAE.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from autoencoder import encoded
from torch import nn
from training import (
    add_denoiser_options,
    initialise,
    load_digits,
    save,
    train_denoiser,
    training_parser,
)

from goc_deploy.exporters.architectures.dit_model import DiT
from goc_deploy.spec import ModelSpec

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


def main(argv: Sequence[str] | None = None) -> int:
    parser = training_parser(__doc__, "dit_mnist.pt", minutes=40.0)
    add_denoiser_options(parser)
    parser.add_argument("--vae", type=Path, help="folder of train_vae.py, to train on its latents")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    images, labels = load_digits(args.data)
    if args.vae:
        images = encoded(args.vae, images)
    model = train_denoiser(TrainedDiT(LATENTS if args.vae else PIXELS), images, labels, args)
    save(model.state_dict(), args.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
