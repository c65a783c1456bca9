"""A tiny Qwen-Image of random weights, which has two streams, and an engine directory of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

CONFIG: dict[str, Any] = {
    "num_attention_heads": 3,
    "attention_head_dim": 32,
    "axes_dims_rope": (4, 14, 14),
    "joint_attention_dim": 40,
    "num_layers": 3,
}
LENGTHS = (9, 5)  # tokens of the two captions


def random_qwen() -> Any:
    """diffusers' model with weights that every part of the output depends on."""
    import diffusers

    torch.manual_seed(0)
    model = diffusers.QwenImageTransformer2DModel(**CONFIG).eval()
    for name, parameter in model.named_parameters():
        norm = "norm" in name and name.endswith("weight") and parameter.ndim == 1
        parameter.data.normal_(1.0 if norm else 0.0, 0.1)
    return model


def write_captions(path: Path) -> Path:
    """Two captions of different lengths, and a negative one, as prompt embeddings."""
    generator = np.random.default_rng(0)
    longest = max(LENGTHS)
    mask = [[int(token < length) for token in range(longest)] for length in LENGTHS]
    np.savez(
        path,
        prompt_embeds=generator.standard_normal((len(LENGTHS), longest, 40), np.float32),
        prompt_attention_mask=np.array(mask),
        negative_prompt_embeds=generator.standard_normal((1, 4, 40), np.float32),
    )
    return path
