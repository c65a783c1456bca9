"""Prompts of the emoji example as a two-stream model reads them: embeddings, and their mean.

    python examples/two_streams/prompts.py captions.safetensors  # the held-out captions

writes the file that ``goc-export --captions`` and ``goc-run --prompt-embeds`` read.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from goc_deploy.exporters.companions.t5 import T5Encoder, t5_config

sys.path.append(str(Path(__file__).resolve().parents[1] / "mnist"))
sys.path.append(str(Path(__file__).resolve().parents[1] / "emoji"))
from captions import PAD, TOKENS, read_captions, token_rows

EMOJI = Path(__file__).resolve().parents[1] / "emoji"
ENCODER = EMOJI / "text_encoder"


class Prompts(nn.Module):
    """The text encoder of the emoji example, with its shipped weights."""

    def __init__(self) -> None:
        super().__init__()
        settings = json.loads((ENCODER / "config.json").read_text(encoding="utf-8"))
        self.width = int(settings["d_model"])
        self.tokenizer = Tokenizer.from_file(str(ENCODER / "tokenizer.json"))
        self.encoder = T5Encoder(t5_config(settings, "the emoji example"), TOKENS)
        weights = load_file(ENCODER / "model.safetensors")
        self.encoder.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
        self.requires_grad_(False)

    def forward(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Embeddings (N, L, C), zeros behind a prompt, and their mean over a prompt, (N, C)."""
        tokens = torch.tensor(token_rows(self.tokenizer, prompts))
        kept = (tokens != PAD).float()
        embeddings = self.encoder(tokens, kept) * kept[..., None]
        return embeddings, embeddings.sum(1) / kept.sum(1, keepdim=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="file to write, .safetensors")
    parser.add_argument(
        "--prompt", action="append", help="repeatable (default: the held-out caption of each emoji)"
    )
    args = parser.parse_args(argv)
    read = Prompts()
    texts = args.prompt or [entry.held_out for entry in read_captions().values()]
    embeddings, pooled = read(texts)
    null, null_pooled = read([""])
    tensors = {
        "prompt_embeds": embeddings,
        "pooled_prompt_embeds": pooled,
        "negative_prompt_embeds": null,
        "negative_pooled_prompt_embeds": null_pooled,
    }
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, args.output)
    print(f"{args.output}: {len(texts)} prompts")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
