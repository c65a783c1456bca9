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
import copy
import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from prompts import EMOJI, Prompts
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

# isort: split
from captions import random_prompt, read_captions
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
from training import CONDITION_DROPOUT, Optimizer

FOLDER = Path("~/.cache/goc_deploy/two_streams")
SIDE, TRAIN_TIMESTEPS, SHIFT = 32, 1000, 2.0
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


def pictures() -> Tensor:
    """The emoji (N, 3, 32, 32) float32 in [-1, 1], in the order of the captions."""
    with np.load(EMOJI / "pictures.npz") as arrays:
        images = torch.from_numpy(arrays["images"]).permute(0, 3, 1, 2).float() / 127.5 - 1
    return nn.functional.interpolate(images, (SIDE, SIDE), mode="bilinear", antialias=True)


class Training:
    """The whole state of a training."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        self.args, self.pictures, self.prompts = args, pictures(), Prompts()
        self.captions, self.draw = list(read_captions().values()), random.Random(args.seed)
        widths = dict.fromkeys(("joint_attention_dim", "pooled_projection_dim"), self.prompts.width)
        self.model = SD3Transformer2DModel(**SIZES, **widths)
        for name, parameter in self.model.named_parameters():
            if "norm1" in name or name.startswith(("norm_out", "proj_out")):
                nn.init.zeros_(parameter)
        self.average = copy.deepcopy(self.model)
        self.optimizer = Optimizer(self.model, args.adam_rate, args.muon_rate, args.bf16)
        self.predict = torch.compile(self.model) if args.compile else self.model
        self.step = 0

    def take_step(self, factor: float) -> float:
        """One update at this factor of the learning rates; returns the loss."""
        chosen = [self.draw.randrange(len(self.captions)) for _ in range(self.args.batch)]
        text, pooled = self.prompts(
            [
                ""
                if self.draw.random() < CONDITION_DROPOUT
                else random_prompt(self.captions[i], self.draw)
                for i in chosen
            ]
        )
        clean = self.pictures[chosen]
        even = (torch.arange(len(clean)) + torch.rand(len(clean))) / len(clean)
        sigma = SHIFT * even / (1 + (SHIFT - 1) * even)
        noise, weight = torch.randn_like(clean), sigma[:, None, None, None]
        noisy = (1 - weight) * clean + weight * noise
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=self.args.bf16),
            sdpa_kernel(SDPBackend.MATH),  # the fused attention is slow on few tokens
        ):
            velocity = self.predict(noisy, text, pooled, TRAIN_TIMESTEPS * sigma).sample
        loss = (velocity.float() - (noise - clean)).square().mean()
        return descend(self, loss, factor)

    def save(self) -> None:
        """Write the whole state, and the averaged weights for goc-export."""
        write_state(state_of(self), self.args.folder / CHECKPOINT)
        save_pipeline(self.average, self.args.folder / "pipeline")

    def restore(self) -> None:
        """Go on from the checkpoint."""
        restore(self, torch.load(self.args.folder / CHECKPOINT, weights_only=True))
        self.draw.seed(self.args.seed + self.step)
        torch.manual_seed(self.args.seed + self.step)


def save_pipeline(model: SD3Transformer2DModel, folder: Path) -> None:
    """Write the folder of a StableDiffusion3Pipeline in float16, without its encoders."""
    copy.deepcopy(model).half().save_pretrained(folder / "transformer")
    FlowMatchEulerDiscreteScheduler(shift=SHIFT).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusion3Pipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "transformer": ["diffusers", "SD3Transformer2DModel"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    parser = resumable_parser(__doc__.splitlines()[0], FOLDER)
    parser.set_defaults(adam_rate=2e-3)
    training = Training(parsed(parser, argv))
    start(training)
    run(training, "images")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
