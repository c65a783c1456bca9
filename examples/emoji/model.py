"""The sizes of this example's PixArt and T5 encoder, and the files that goc-export reads."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from captions import PAD, SPECIAL, TOKENS, token_rows
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from goc_deploy.exporters.architectures.pixart import NULL_CAPTION
from goc_deploy.spec import ModelSpec

sys.path.append(str(Path(__file__).resolve().parents[1] / "mnist"))  # what both examples train with
from prompted import PromptedPixArt, save_text_encoder, without_text_encoder

TEXT_WIDTH = 128
CHECKPOINT, TEXT_ENCODER = "pixart_emoji.safetensors", "text_encoder"
SPEC = ModelSpec(
    depth=6,
    hidden=192,
    heads=6,
    mlp_hidden=768,
    patch=8,
    grid=6,
    channels=3,
    choices=0,
    learn_sigma=False,
    architecture="pixart",
    branches=("attn", "cross", "mlp"),
    guided_channels=3,
    caption_channels=TEXT_WIDTH,
    caption_tokens=TOKENS,
)


def text_settings(words: int) -> dict[str, Any]:
    """``config.json`` of the text encoder for a vocabulary of so many words."""
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "d_model": TEXT_WIDTH,
        "d_kv": 32,
        "d_ff": 256,
        "num_heads": 4,
        "num_layers": 2,
        "vocab_size": -(-(len(SPECIAL) + words) // 64) * 64,
        "feed_forward_proj": "gated-gelu",
        "layer_norm_epsilon": 1e-6,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 16,
        "pad_token_id": PAD,
        "eos_token_id": SPECIAL.index("</s>"),
        "tie_word_embeddings": False,
    }


def as_tensor(tokenizer: Tokenizer, prompts: Sequence[str]) -> Tensor:
    """Tokens of prompts, (N, L) int64."""
    return torch.tensor(token_rows(tokenizer, prompts))


def save_pipeline(model: PromptedPixArt, tokenizer: Tokenizer, folder: Path) -> None:
    """Write float16 weights as PixArt and T5 lay them out.

    ``goc-export`` and its ``--text-encoder`` read them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    empty = as_tensor(tokenizer, [""]).to(model.pos_embed.device)
    with torch.inference_mode():
        null = model.text_encoder(empty, (empty != PAD).float())[0]
    halves = {name: tensor.detach().cpu().half() for name, tensor in model.state_dict().items()}
    tensors = {**without_text_encoder(halves), NULL_CAPTION: null.cpu().half()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / CHECKPOINT)
    save_text_encoder(halves, model.text_settings, tokenizer, folder / TEXT_ENCODER)
