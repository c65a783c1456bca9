"""The text half of a CLIP as a graph: token numbers to embeddings of tokens and of the whole text.

The graph is float32. Parameter names are those of the state dict in transformers without the prefix
``text_model.``, which not all files have.

Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision",
ICML 2021, section 2.4. That the tokens have the embeddings before the last layer: Esser et al.,
"Scaling Rectified Flow Transformers for High-Resolution Image Synthesis", ICML 2024, section 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from msgspec import Struct
from torch import Tensor, nn

from goc_deploy.errors import ModelError
from goc_deploy.exporters.checkpoint import Checkpoint
from goc_deploy.exporters.companions.clip_tokenizer import ClipTokenizer, read_clip_tokenizer
from goc_deploy.exporters.companions.t5 import PADDING_SCORE, Plain
from goc_deploy.exporters.folders import CONFIG, Setting, Settings, read_json, read_weights
from goc_deploy.exporters.tracing import Examples, check_shapes, empty_module, same_names, shapes_of
from goc_deploy.exporters.units import GraphKind, Input
from goc_deploy.spec import ClipSpec, Count, ModelSpec

KINDS = ("clip_text_model",)
PROJECTS = "CLIPTextModelWithProjection"
PREFIX, POSITION_NUMBERS = "text_model.", "embeddings.position_ids"  # the latter in old files
ACTIVATIONS = ("quick_gelu", "gelu")
HIGHEST = 2  # an end token of old configurations, which stands for the highest token of a text


class ClipConfig(
    Struct,
    frozen=True,
    rename={
        "width": "hidden_size",
        "inner": "intermediate_size",
        "heads": "num_attention_heads",
        "layers": "num_hidden_layers",
        "vocabulary": "vocab_size",
        "tokens": "max_position_embeddings",
        "projection": "projection_dim",
        "activation": "hidden_act",
        "eos": "eos_token_id",
    },
):
    """The settings of ``config.json`` that concern the text half, with transformers' defaults.

    Attributes:
        width: width of the embeddings.
        inner: width of the feed-forward layers.
        heads: attention heads per layer.
        layers: number of layers.
        vocabulary: rows of the embedding table.
        tokens: tokens of a text with its padding.
        projection: width of the projected embedding of a text.
        activation: one of `ACTIVATIONS`.
        eos: number of the token that ends a text, or `HIGHEST`.
        architectures: class of the model; one of them projects the embedding of the text.
    """

    width: Setting = 512
    inner: Setting = 2048
    heads: Setting = 8
    layers: Setting = 12
    vocabulary: Setting = 49408
    tokens: Setting = 77
    projection: Setting = 512
    activation: str = "quick_gelu"
    eos: Count = 49407
    architectures: tuple[str, ...] = ()

    @property
    def projects(self) -> bool:
        """Whether the embedding of the text is projected, as in Stable Diffusion 3."""
        return PROJECTS in self.architectures

    @property
    def pooled(self) -> int:
        """Width of the embedding of the whole text."""
        return self.projection if self.projects else self.width


SETTINGS = Settings(
    ClipConfig,
    required={
        "model_type": KINDS,
        "hidden_act": ACTIVATIONS,
        "layer_norm_eps": (1e-5,),
    },
)


@dataclass(frozen=True)
class ClipFiles:
    """A CLIP text encoder that was read: configuration, tensors, and tokenizer."""

    config: ClipConfig
    checkpoint: Checkpoint
    tokenizer: ClipTokenizer

    def spec(self, tokenizer: str) -> ClipSpec:
        """The inputs and outputs of the unit, whose tokenizer lies at a path.

        Stable Diffusion 3 reads the tokens of encoders that project, FLUX those of no CLIP.
        """
        config, tokens = self.config, self.tokenizer
        return ClipSpec(
            tokenizer,
            config.vocabulary,
            tokens.eos,
            tokens.pad,
            config.tokens,
            config.pooled,
            config.width if config.projects else 0,
        )


def is_clip(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` describes the text half of a CLIP."""
    return config.get("model_type") in KINDS


def read_clip(folder: Path, tokenizer_folder: Path) -> ClipFiles:
    """Read a CLIP text encoder and its tokenizer.

    Args:
        folder: the folder that transformers saved the encoder to.
        tokenizer_folder: the folder of its tokenizer.

    Raises:
        ModelError: a setting is not supported, or the weights or the tokenizer are missing,
            damaged, or do not fit the configuration.
        SafetyError: an index names files outside the folder, or a file asks to run code.
    """
    where = f"{folder / CONFIG}"
    config = clip_config(read_json(folder / CONFIG), where)
    tokenizer = read_clip_tokenizer(tokenizer_folder, config.vocabulary, config.tokens)
    if config.eos not in (HIGHEST, tokenizer.eos) or (
        config.eos == HIGHEST and tokenizer.eos < tokenizer.highest
    ):
        raise ModelError(
            f"{where}: eos_token_id is {config.eos}, but {tokenizer_folder} ends a text with token "
            f"{tokenizer.eos}; they do not belong together"
        )
    files, stored = read_weights(folder, "model", "pytorch_model")
    named = {name.removeprefix(PREFIX): tensor for name, tensor in stored.items()}
    named.pop(POSITION_NUMBERS, None)
    if not config.projects:
        named.pop("text_projection.weight", None)
    check_shapes(
        named, shapes_of(lambda: ClipEncoder(config)), f"the text encoder that {where} describes"
    )
    used = (folder / CONFIG, *files, *tokenizer.files)
    return ClipFiles(config, Checkpoint(folder.parent, named, "plain", used), tokenizer)


def clip_config(config: Mapping[str, Any], where: str) -> ClipConfig:
    """The text encoder that a ``config.json`` describes.

    Unknown settings are ignored, because transformers writes many that concern other uses.

    Raises:
        ModelError: a setting is not supported or out of range; the message names it.
    """
    relevant = {name: value for name, value in config.items() if name in SETTINGS.known}
    settings = SETTINGS.read(relevant, where)
    if settings.width % settings.heads or settings.layers < 2:
        raise ModelError(
            f"{where}: hidden_size must be a multiple of num_attention_heads, and "
            f"num_hidden_layers at least 2, got {settings.width}, {settings.heads} and "
            f"{settings.layers}"
        )
    return settings


def clip_kind(name: str, config: ClipConfig, spec: ModelSpec) -> GraphKind:
    """The graph of a CLIP text encoder.

    Inputs: tokens (K, L) int64, end (K, L) float32. Outputs: pooled (K, P) float32, and of an
    encoder that projects embeds (K, L, C) float32.
    """
    examples = Examples(spec, torch.float32)
    module = empty_module(lambda: ClipEncoder(config), torch.float32, examples.generator)
    tokens = torch.randint(config.vocabulary, (2, config.tokens), generator=examples.generator)
    end = torch.eye(config.tokens)[[config.tokens // 3, config.tokens - 1]]
    inputs = (Input("tokens", tokens, {0: "captions"}), Input("end", end, {0: "captions"}))
    outputs = ("pooled", "embeds") if config.projects else ("pooled",)
    return GraphKind(
        name, module, inputs, outputs, {name: same_names(module)}, weights_are_inputs=True
    )


class Attention(nn.Module):
    """Attention of each token to itself and the tokens before it."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.heads = config.heads
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            self.add_module(name, nn.Linear(config.width, config.width))

    def forward(self, x: Tensor, shape: tuple[int, int], bias: Tensor) -> Tensor:
        """(K*L, C) of texts of ``shape`` (K, L), and bias (L, L), to (K*L, C)."""
        q, k, v = (
            self.get_submodule(f"{part}_proj")(x).reshape(*shape, self.heads, -1).transpose(1, 2)
            for part in "qkv"
        )
        scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2)) + bias
        mixed = torch.matmul(torch.softmax(scores, dim=-1), v).transpose(1, 2)
        return self.get_submodule("out_proj")(mixed.reshape(x.shape[0], -1))


class Layer(nn.Module):
    """Attention, followed by the feed-forward layers."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.quick = config.activation == "quick_gelu"
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.self_attn = Attention(config)
        self.mlp = nn.ModuleDict(
            {
                "fc1": nn.Linear(config.width, config.inner),
                "fc2": nn.Linear(config.inner, config.width),
            }
        )

    def forward(self, x: Tensor, shape: tuple[int, int], bias: Tensor) -> Tensor:
        """(K*L, C) of texts of ``shape`` (K, L), and bias (L, L), to (K*L, C)."""
        x = x + self.self_attn(self.layer_norm1(x), shape, bias)
        inner = self.mlp["fc1"](self.layer_norm2(x))
        inner = inner * torch.sigmoid(1.702 * inner) if self.quick else F.gelu(inner)
        return x + self.mlp["fc2"](inner)


class ClipEncoder(nn.Module):
    """Tokens to the embedding of a text, and to those of its tokens before the last layer."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.embeddings = nn.ModuleDict(
            {
                "token_embedding": nn.Embedding(config.vocabulary, config.width),
                "position_embedding": nn.Embedding(config.tokens, config.width),
            }
        )
        layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.encoder = nn.ModuleDict({"layers": layers})
        self.final_layer_norm = nn.LayerNorm(config.width)
        self.text_projection = Plain(config.width, config.projection) if config.projects else None

    def forward(self, tokens: Tensor, end: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Tokens to embeddings.

        Args:
            tokens: (K, L) int64.
            end: (K, L) float32, one at the first token that ends the text, zeros elsewhere.

        Returns:
            The embedding of each text (K, P), and if it is projected those of its tokens (K, L, C).
        """
        count, length = tokens.shape
        embedded = self.embeddings["token_embedding"](tokens.reshape(-1)).reshape(count, length, -1)
        x = embedded + self.embeddings["position_embedding"].weight
        x = x.reshape(count * length, -1)
        bias = PADDING_SCORE * torch.ones(length, length).triu(1)
        layers: list[nn.Module] = list(self.encoder["layers"].children())
        for layer in layers[:-1]:
            x = layer(x, (count, length), bias)
        embeds = x.reshape(count, length, -1)
        final = self.final_layer_norm(layers[-1](x, (count, length), bias)).reshape(
            count, length, -1
        )
        pooled = torch.matmul(end[:, None], final)[:, 0]  # the row of the token that ends the text
        if self.text_projection is None:
            return pooled
        return self.text_projection(pooled), embeds
