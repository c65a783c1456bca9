"""Train a small Wan that moves a digit as its prompt asks, and its text encoder.

The training may take as many sessions as it needs.

    python examples/clips/train.py --resume  # until it is stopped
    python examples/clips/train.py --resume --decay-steps 5000  # the last steps, rates fall

It works on latents of the digits' VAE, frame by frame. Everything is in one folder outside the
repository: ``clips.pt``, ``checkpoint.pt`` and ``pipeline/``, which goc-export reads. It needs
diffusers, whose WanTransformer3DModel is trained.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from clips import MNIST, prompt_of, words
from clips import latents_of_clips as clips_from_digits
from diffusers import UniPCMultistepScheduler, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from goc_deploy.exporters.companions.t5 import T5Encoder, t5_config

# isort: split
from captions import PAD, TOKENS, token_rows, tokenizer_of_words
from model import text_settings
from prompted import save_text_encoder
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
from training import (
    CONDITION_DROPOUT,
    Optimizer,
    load_digits,
)

FOLDER = Path("~/.cache/goc_deploy/clips")
CAPTION_TOKENS = 512  # of every Wan; the places behind a prompt are zeros
TRAIN_TIMESTEPS = 1000
SHIFT = 3.0
UMT5 = {"model_type": "umt5", "architectures": ["UMT5EncoderModel"]}
MODEL = {
    "num_attention_heads": 4,
    "attention_head_dim": 30,
    "in_channels": 4,
    "out_channels": 4,
    "ffn_dim": 480,
    "num_layers": 6,
}


class ManyZeros(WanAttnProcessor):
    """Attention in which the last token of the caption stands for every place behind the prompt.

    These places have equal keys and values, so one of them with the logarithm of their number
    added to its scores has the same effect as all of them.
    """

    def __call__(
        self, attn: Any, hidden_states: Tensor, captions: Tensor | None = None, *args: Any
    ) -> Tensor:
        mask = None
        if captions is not None:
            places = captions.shape[1]
            mask = torch.zeros(1, 1, 1, places, dtype=hidden_states.dtype)
            mask[..., -1] = math.log(CAPTION_TOKENS - places + 1)
        result: Tensor = super().__call__(attn, hidden_states, captions, mask, *args[1:])
        return result


class PromptedWan(nn.Module):
    """A Wan and its text encoder."""

    def __init__(self, text: dict[str, Any]) -> None:
        super().__init__()
        self.wan = WanTransformer3DModel(**MODEL, text_dim=text["d_model"])
        for block in self.wan.blocks:
            block.attn2.set_processor(ManyZeros())
        self.text_encoder = T5Encoder(t5_config(text, "the example"), TOKENS)
        for name, parameter in self.text_encoder.named_parameters():
            if parameter.ndim == 1:
                nn.init.ones_(parameter)
            else:
                std = 1.0 if name == "shared.weight" else parameter.shape[1] ** -0.5
                nn.init.normal_(parameter, std=std)

    def forward(self, noisy: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        """The velocity of latents (N, C, F, H, W) at timesteps (N,), of prompts (N, L)."""
        captions = self.text_encoder(tokens, (tokens != PAD).float())
        captions = nn.functional.pad(captions, (0, 0, 0, 1))
        velocity: Tensor = self.wan(noisy, t, captions).sample
        return velocity


class Training:
    """The whole state of a training."""

    def __init__(self, args: argparse.Namespace, clips: dict[str, Tensor]) -> None:
        torch.manual_seed(args.seed)
        self.args, self.clips = args, clips
        self.tokenizer, self.draw = tokenizer_of_words(words()), random.Random(args.seed)
        self.text = {**text_settings(len(words())), **UMT5}
        self.model = PromptedWan(self.text)
        self.average = copy.deepcopy(self.model)
        self.optimizer = Optimizer(self.model, args.adam_rate, args.muon_rate, args.bf16)
        self.predict = torch.compile(self.model) if args.compile else self.model
        self.step = 0

    def take_step(self, factor: float) -> float:
        """One update at this factor of the learning rates; returns the loss."""
        chosen = torch.randint(len(self.clips["latents"]), (self.args.batch,))
        prompts = [
            ""
            if self.draw.random() < CONDITION_DROPOUT
            else prompt_of(int(self.clips["digits"][i]), int(self.clips["motions"][i]), self.draw)
            for i in chosen.tolist()
        ]
        tokens = torch.tensor(token_rows(self.tokenizer, prompts))
        clean = self.clips["latents"][chosen].float()
        even = (torch.arange(len(clean)) + torch.rand(len(clean))) / len(clean)
        sigma = SHIFT * even / (1 + (SHIFT - 1) * even)
        noise = torch.randn_like(clean)
        weight = sigma[:, None, None, None, None]
        noisy = (1 - weight) * clean + weight * noise
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=self.args.bf16),
            sdpa_kernel(SDPBackend.MATH),  # the fused attention is slow on few tokens
        ):
            predicted = self.predict(noisy, TRAIN_TIMESTEPS * sigma, tokens)
        loss = (predicted.float() - (noise - clean)).square().mean()
        return descend(self, loss, factor)

    def save(self) -> None:
        """Write the whole state, and the averaged weights for goc-export."""
        write_state(state_of(self), self.args.folder / CHECKPOINT)
        save_pipeline(self.average, self.text, self.tokenizer, self.args.folder / "pipeline")

    def restore(self) -> None:
        """Go on from the checkpoint."""
        state = torch.load(self.args.folder / CHECKPOINT, weights_only=True)
        restore(self, state)
        self.draw.seed(self.args.seed + self.step)
        torch.manual_seed(self.args.seed + self.step)


def save_pipeline(model: PromptedWan, text: dict[str, Any], tokenizer: Any, folder: Path) -> None:
    """Write the folder of a WanPipeline in float16, and the text encoder beside it."""
    copy.deepcopy(model.wan).half().save_pretrained(folder / "transformer")
    UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT
    ).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "WanPipeline",
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=1) + "\n")
    halves = {name: tensor.detach().half() for name, tensor in model.state_dict().items()}
    save_text_encoder(halves, text, tokenizer, folder / "text_encoder")


def main(argv: Sequence[str] | None = None) -> int:
    parser = resumable_parser(__doc__.splitlines()[0], FOLDER)
    parser.add_argument("--data", type=Path, default=MNIST / "mnist10k.npz")
    parser.add_argument("--clips", type=int, default=20_000, help="clips to make and learn from")
    parser.set_defaults(adam_rate=2e-3)
    args = parsed(parser, argv)
    path = args.folder / "clips.pt"
    if not path.exists():
        made = clips_from_digits(*load_digits(args.data), args.clips, args.seed)
        write_state(made, path)
    training = Training(args, torch.load(path, weights_only=True))
    start(training)
    run(training, "clips")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
