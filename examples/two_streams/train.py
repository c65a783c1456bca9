"""Train a small Stable Diffusion 3 on the emoji of ../emoji, at 32x32 pixels.

The training may take as many sessions as it needs.

    python examples/two_streams/train.py --resume  # until it is stopped
    python examples/two_streams/train.py --resume --decay-steps 3000  # the last steps, rates fall

Everything is in one folder outside the repository: ``checkpoint.pt`` and ``pipeline/``, which
goc-export reads. It needs diffusers, whose SD3Transformer2DModel is trained. The text encoder is
that of the emoji example and stays as it is.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from prompts import EMOJI, Prompts
from torch import Tensor, nn

# isort: split
from captions import random_prompts, read_captions
from pictures import load_pictures
from pipeline_folder import save_pipeline
from resumable import ResumableTraining, parsed, resumable_parser
from training import CONDITION_DROPOUT, flow_batch

FOLDER = Path("~/.cache/goc_deploy/two_streams")
SIDE, SHIFT = 32, 2.0
SIZES = {
    "sample_size": SIDE,
    "patch_size": 4,
    "in_channels": 3,
    "out_channels": 3,
    "num_layers": 6,
    "attention_head_dim": 32,
    "num_attention_heads": 3,
    "caption_projection_dim": 96,
    "pos_embed_max_size": SIDE // 4,
    "dual_attention_layers": (0, 1),
    "qk_norm": "rms_norm",
}


class Training(ResumableTraining):
    """Of a Stable Diffusion 3 that learns the velocities of emoji."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        captions, self.prompts = read_captions(), Prompts()
        self.captions = list(captions.values())
        images = load_pictures(EMOJI / "pictures.npz", list(captions))
        self.pictures = F.interpolate(images, (SIDE, SIDE), mode="bilinear", antialias=True)
        widths = dict.fromkeys(("joint_attention_dim", "pooled_projection_dim"), self.prompts.width)
        model = SD3Transformer2DModel(**SIZES, **widths)
        for name, parameter in model.named_parameters():
            if "norm1" in name or name.startswith(("norm_out", "proj_out")):
                nn.init.zeros_(parameter)
        super().__init__(args, model)

    def loss(self) -> Tensor:
        """The loss of a random batch."""
        chosen = [self.draw.randrange(len(self.captions)) for _ in range(self.args.batch)]
        texts = random_prompts([self.captions[i] for i in chosen], CONDITION_DROPOUT, self.draw)
        text, pooled = self.prompts(texts)
        noisy, t, velocity = flow_batch(self.pictures[chosen], SHIFT)
        predicted: Tensor = self.predict(noisy, text, pooled, t).sample
        return (predicted.float() - velocity).square().mean()

    def write_weights(self) -> None:
        """Write the folder of a StableDiffusion3Pipeline, without its encoders."""
        scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
        folder = self.args.folder / "pipeline"
        save_pipeline("StableDiffusion3Pipeline", self.average, scheduler, folder)


def main(argv: Sequence[str] | None = None) -> int:
    parser = resumable_parser(__doc__.splitlines()[0], FOLDER)
    parser.set_defaults(adam_rate=2e-3)
    training = Training(parsed(parser, argv))
    training.start()
    training.run("images")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
