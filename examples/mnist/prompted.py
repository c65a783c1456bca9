"""A PixArt and its T5 encoder in one module that can be trained, and the folder of the encoder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from training import initialise

from goc_deploy.exporters.architectures.dit_model import Attention, modulate, unpatchify
from goc_deploy.exporters.architectures.pixart import CrossAttention, PublicLayout
from goc_deploy.exporters.companions.t5 import T5Encoder, t5_config
from goc_deploy.spec import ModelSpec

PREFIX = "text_encoder."
MASKED_SCORE = -1e4


class PromptedPixArt(PublicLayout):
    """A PixArt and its text encoder, with the weights that a run starts from."""

    def __init__(self, spec: ModelSpec, text: Mapping[str, Any]) -> None:
        super().__init__(spec)
        self.spec, self.text_settings, self.pad = spec, dict(text), text["pad_token_id"]
        initialise(
            self, lambda name: name.endswith("cross_attn.proj") or name == "final_layer.linear"
        )
        nn.init.normal_(self.t_block[1].weight, std=0.02)
        for name, parameter in self.named_parameters():
            if name.endswith("scale_shift_table"):
                nn.init.normal_(parameter, std=spec.hidden**-0.5)
        self.text_encoder = new_text_encoder(text, spec.caption_tokens)

    def forward(self, x: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        """The model output for samples (B, C, H, W), shaped like them.

        The timesteps are (B,), the tokens of the prompts (B, L) int64.
        """
        kept = tokens != self.pad
        captions = self.y_embedder["y_proj"](self.text_encoder(tokens, kept.float()))  # (B, L, D)
        condition = self.t_embedder(t)  # (B, D)
        shared = self.t_block(condition).unflatten(-1, (6, -1))
        h = self.x_embedder(x) + self.pos_embed  # (B, T, D)
        for block in self.blocks:
            shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (
                shared + block.scale_shift_table
            ).unbind(1)
            h = h + gate_a[:, None] * self._attended(block.attn, modulate(h, shift_a, scale_a))
            h = h + self._captioned(block.cross_attn, h, captions, kept)
            h = h + gate_m[:, None] * block.mlp(modulate(h, shift_m, scale_m))
        shift, scale = (condition[:, None] + self.final_layer.scale_shift_table).unbind(1)
        return unpatchify(self.final_layer.linear(modulate(h, shift, scale)), self.spec)

    def _attended(self, layers: Attention, x: Tensor) -> Tensor:
        """Self-attention of tokens (B, T, D)."""
        queries, keys, values = map(self._heads, layers.qkv(x).chunk(3, dim=-1))
        return layers.proj(attention(queries, keys, values).transpose(1, 2).flatten(2))

    def _captioned(
        self, layers: CrossAttention, x: Tensor, captions: Tensor, kept: Tensor
    ) -> Tensor:
        """Cross-attention of tokens (B, T, D) to the captions (B, L, D).

        ``kept`` (B, L) marks the caption tokens that take part.
        """
        keys, values = map(self._heads, layers.kv_linear(captions).chunk(2, dim=-1))
        queries = self._heads(layers.q_linear(x))
        mixed = attention(queries, keys, values, kept[:, None, None])
        return layers.proj(mixed.transpose(1, 2).flatten(2))

    def _heads(self, rows: Tensor) -> Tensor:
        """(B, T, D) to (B, heads, T, D / heads)."""
        return rows.unflatten(-1, (self.spec.heads, -1)).transpose(1, 2)


def new_text_encoder(text: Mapping[str, Any], tokens: int) -> T5Encoder:
    """A text encoder with the weights that a run starts from."""
    encoder = T5Encoder(t5_config(text, "the example"), tokens)
    for name, parameter in encoder.named_parameters():
        if parameter.ndim == 1:
            nn.init.ones_(parameter)
        else:
            std = 1.0 if name == "shared.weight" else parameter.shape[1] ** -0.5
            nn.init.normal_(parameter, std=std)
    return encoder


def attention(queries: Tensor, keys: Tensor, values: Tensor, kept: Tensor | None = None) -> Tensor:
    """Softmax attention (B, heads, T, D / heads), as products of matrices.

    The fused attention of PyTorch is not used: on a CPU, its backward pass of the few tokens of
    these models takes 33 ms per block (64 images, 36 tokens, 6 heads, one core of an AMD EPYC,
    torch.profiler), as long as all other work of a training step together.

    Args:
        queries: (B, heads, T, D / heads).
        keys: (B, heads, L, D / heads).
        values: shaped like ``keys``.
        kept: which keys take part, boolean, broadcast to (B, heads, T, L); all if None.
    """
    scores = (queries * queries.shape[-1] ** -0.5) @ keys.transpose(-1, -2)  # (B, heads, T, L)
    if kept is not None:
        scores = scores.masked_fill(~kept, MASKED_SCORE)
    return scores.softmax(dim=-1).to(values.dtype) @ values


def without_text_encoder(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the PixArt alone, under its public names."""
    return {name: tensor for name, tensor in state.items() if not name.startswith(PREFIX)}


def save_text_encoder(
    state: Mapping[str, Tensor], text: Mapping[str, Any], tokenizer: Tokenizer, folder: Path
) -> None:
    """Write the folder of a text encoder.

    ``T5EncoderModel.from_pretrained`` and ``goc-export --text-encoder`` read it.

    Args:
        state: of a `PromptedPixArt`.
        text: content of ``config.json``.
        tokenizer: of the prompts.
        folder: to write to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(text), indent=1) + "\n", encoding="utf-8")
    encoder = {
        name.removeprefix(PREFIX): tensor
        for name, tensor in state.items()
        if name.startswith(PREFIX)
    }
    save_file(
        {name: tensor.contiguous() for name, tensor in encoder.items()},
        folder / "model.safetensors",
    )
    tokenizer.save(str(folder / "tokenizer.json"))
