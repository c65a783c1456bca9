"""A tiny random T5 encoder and its tokenizer, made without transformers and SentencePiece.

They have the layout of both.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from goc_deploy.exporters.companions.t5 import T5Encoder, t5_config

CONFIG = {
    "architectures": ["T5EncoderModel"],
    "model_type": "t5",
    "d_model": 20,
    "d_kv": 8,
    "d_ff": 32,
    "num_heads": 3,
    "num_layers": 2,
    "vocab_size": 48,
    "feed_forward_proj": "gated-gelu",
    "layer_norm_epsilon": 1e-6,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "is_encoder_decoder": True,
    "tie_word_embeddings": False,
    "dropout_rate": 0.1,
}
SPACE = "\u2581"
PIECES = (
    ("<pad>", 0.0, 3),
    ("</s>", 0.0, 3),
    ("<unk>", 0.0, 2),
    *(
        (f"{SPACE}{word}", -float(i), 1)
        for i, word in enumerate(("a", "the", "three", "seven", "red", "blue"), 2)
    ),
    (SPACE, -8.0, 1),
    *((letter, -9.0 - i / 10, 1) for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz")),
)


def field(number: int, content: bytes) -> bytes:
    """A length-delimited field of a protocol buffer."""
    assert len(content) < 128
    return bytes([number << 3 | 2, len(content)]) + content


def sentencepiece_model() -> bytes:
    """A unigram model of ``PIECES``."""
    pieces = b""
    for name, score, kind in PIECES:
        entry = (
            field(1, name.encode())
            + bytes([2 << 3 | 5])
            + struct.pack("<f", score)
            + bytes([3 << 3, kind])
        )
        pieces += field(1, entry)
    return pieces + field(3, field(1, b"identity"))


def save_encoder(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """A folder of a T5 encoder with its tokenizer in it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        n: t.shape
        for n, t in T5Encoder(t5_config({**CONFIG, **changes}, ""), 4).state_dict().items()
    }
    state = {
        name: 0.3 * torch.randn(shape, generator=generator) + (1.0 if len(shape) == 1 else 0.0)
        for name, shape in shapes.items()
    }
    save_file(state, folder / "model.safetensors")
    (folder / "spiece.model").write_bytes(sentencepiece_model())
    return folder
