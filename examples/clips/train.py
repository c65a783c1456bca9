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
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from clips import MNIST, prompt_of, words
from clips import latents_of_clips as clips_from_digits
from diffusers import UniPCMultistepScheduler, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor, nn

# isort: split
from captions import PAD, TOKENS, token_rows, tokenizer_of_words
from model import text_settings
from pipeline_folder import save_pipeline
from prompted import new_text_encoder, save_text_encoder
from resumable import ResumableTraining, parsed, resumable_parser, write_state
from training import CONDITION_DROPOUT, flow_batch, load_digits

FOLDER = Path("~/.cache/goc_deploy/clips")
CAPTION_TOKENS = 512  # of every Wan; the places behind a prompt are zeros
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
        self.text_encoder = new_text_encoder(text, TOKENS)

    def forward(self, noisy: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        """The velocity of latents (N, C, F, H, W) at timesteps (N,), of prompts (N, L)."""
        captions = self.text_encoder(tokens, (tokens != PAD).float())
        captions = nn.functional.pad(captions, (0, 0, 0, 1))
        velocity: Tensor = self.wan(noisy, t, captions).sample
        return velocity


class Training(ResumableTraining):
    """Of a Wan and its text encoder, which learn the velocities of clips together."""

    def __init__(self, args: argparse.Namespace, clips: dict[str, Tensor]) -> None:
        torch.manual_seed(args.seed)
        self.clips, self.tokenizer = clips, tokenizer_of_words(words())
        self.text = {**text_settings(len(words())), **UMT5}
        super().__init__(args, PromptedWan(self.text))

    def loss(self) -> Tensor:
        """The loss of a random batch."""
        chosen = torch.randint(len(self.clips["latents"]), (self.args.batch,))
        prompts = [
            ""
            if self.draw.random() < CONDITION_DROPOUT
            else prompt_of(int(self.clips["digits"][i]), int(self.clips["motions"][i]), self.draw)
            for i in chosen.tolist()
        ]
        tokens = torch.tensor(token_rows(self.tokenizer, prompts))
        noisy, t, velocity = flow_batch(self.clips["latents"][chosen].float(), SHIFT)
        predicted: Tensor = self.predict(noisy, t, tokens)
        return (predicted.float() - velocity).square().mean()

    def write_weights(self) -> None:
        """Write the folder of a WanPipeline, and the text encoder in it."""
        folder = self.args.folder / "pipeline"
        scheduler = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT
        )
        save_pipeline("WanPipeline", self.average.wan, scheduler, folder)
        halves = {name: tensor.half() for name, tensor in self.average.state_dict().items()}
        save_text_encoder(halves, self.text, self.tokenizer, folder / "text_encoder")


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
    training.start()
    training.run("clips")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
