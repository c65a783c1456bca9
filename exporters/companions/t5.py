"""The encoder of a T5 or UMT5 as a graph: token numbers to embeddings.

The graph is float32, because the activations of T5 overflow in fp16. Parameter names are those of
the state dict in transformers.

Source: Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text
Transformer", JMLR 2020, section 2.1; gated GELU: Shazeer, "GLU Variants Improve Transformer", 2020;
UMT5: Chung et al., "UniMax", ICLR 2023.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from msgspec import Struct
from torch import Tensor, nn

from goc_deploy.errors import ModelError
from goc_deploy.exporters.checkpoint import Checkpoint
from goc_deploy.exporters.companions.tokenizer_files import read_tokenizer
from goc_deploy.exporters.folders import (
    CONFIG,
    Setting,
    Settings,
    part_of_pipeline,
    read_json,
    read_weights,
)
from goc_deploy.exporters.tracing import Examples, check_shapes, empty_module, same_names, shapes_of
from goc_deploy.exporters.units import GraphKind, Input
from goc_deploy.precision import Precision
from goc_deploy.spec import TEXT_ENCODER, Count, ModelSpec

PRECISION: Precision = "fp32"
PADDING_SCORE = -1e9
FEED_FORWARD = {"gated-gelu": True, "relu": False}  # whether a second matrix is the gate
OF_THE_DECODER = ("decoder.", "lm_head.")
_EMBEDDING, _SAME_EMBEDDING = "shared.weight", "encoder.embed_tokens.weight"


class T5Config(
    Struct,
    frozen=True,
    rename={
        "width": "d_model",
        "head": "d_kv",
        "inner": "d_ff",
        "heads": "num_heads",
        "layers": "num_layers",
        "vocabulary": "vocab_size",
        "buckets": "relative_attention_num_buckets",
        "furthest": "relative_attention_max_distance",
        "eos": "eos_token_id",
        "pad": "pad_token_id",
    },
):
    """The settings of ``config.json`` that concern the encoder, with the defaults of transformers.

    Attributes:
        width: width of the embeddings.
        head: width of an attention head.
        inner: width of the feed-forward layers.
        heads: attention heads per layer.
        layers: layers of the encoder.
        vocabulary: rows of the embedding table.
        buckets: buckets of relative positions, half of them for each direction.
        furthest: distance beyond which all positions share a bucket.
        feed_forward_proj: kind of the feed-forward layers, one of `FEED_FORWARD`.
        eos: number of the token that ends a text.
        pad: number of the padding token.
        model_type: ``t5`` or ``umt5``.
    """

    width: Setting = 512
    head: Setting = 64
    inner: Setting = 2048
    heads: Setting = 8
    layers: Setting = 6
    vocabulary: Setting = 32128
    buckets: Setting = 32
    furthest: Setting = 128
    feed_forward_proj: str = "relu"
    eos: Count = 1
    pad: Count = 0
    model_type: str = "t5"

    @property
    def biases_per_layer(self) -> bool:
        """Whether every layer has position biases of its own, as in UMT5."""
        return self.model_type == "umt5"

    @property
    def gated(self) -> bool:
        """Whether the feed-forward layers have a gate (and GELU instead of ReLU)."""
        return FEED_FORWARD[self.feed_forward_proj]


SETTINGS = Settings(
    T5Config,
    required={"model_type": ("t5", "umt5"), "is_decoder": (False,), "layer_norm_epsilon": (1e-6,)},
)


@dataclass(frozen=True)
class TextEncoderFiles:
    """A text encoder that was read: configuration, tensors, and content of ``tokenizer.json``."""

    config: T5Config
    checkpoint: Checkpoint
    tokenizer: bytes


def read_text_encoder(path: Path, spec: ModelSpec, part: str = TEXT_ENCODER) -> TextEncoderFiles:
    """Read a T5 encoder and its tokenizer.

    Args:
        path: folder of a pipeline with ``text_encoder`` and ``tokenizer``, or folder of a T5 that
            transformers saved, with the tokenizer in it or in the adjacent folder ``tokenizer``.
        spec: the model that the encoder is for.
        part: name of the encoder's folder in that of a pipeline.

    Raises:
        ModelError: the folder is not such a folder, a setting is not supported, the weights are
            missing, damaged, or do not fit the configuration, or the width of the embeddings does
            not fit the model.
        SafetyError: an index names files outside the folder, or a file asks to run code.
    """
    if not spec.text_conditional:
        raise ModelError(
            f"{path} is a text encoder, but the model draws class labels; leave it out"
        )
    folder = part_of_pipeline(path, part, "transformers saved a T5 encoder to")
    where = f"{folder / CONFIG}"
    config = t5_config(read_json(folder / CONFIG), where)
    if config.width != spec.caption_channels:
        raise ModelError(
            f"{where}: the encoder makes embeddings of width {config.width} but the model takes "
            f"{spec.caption_channels}; "
            "give the one that it was trained with"
        )
    tokenizer_file, tokenizer = read_tokenizer(
        [folder, folder.parent / part.replace(TEXT_ENCODER, "tokenizer")], config.vocabulary
    )
    files, stored = read_weights(folder, "model", "pytorch_model")
    tensors = {
        name: tensor for name, tensor in stored.items() if not name.startswith(OF_THE_DECODER)
    }
    same = tensors.pop(_SAME_EMBEDDING, None)
    if same is not None:
        tensors.setdefault(_EMBEDDING, same)
    check_shapes(
        tensors, shapes_of(lambda: T5Encoder(config, 2)), f"the T5 encoder that {where} describes"
    )
    used = (folder / CONFIG, *files, tokenizer_file)
    return TextEncoderFiles(config, Checkpoint(folder.parent, tensors, "plain", used), tokenizer)


def t5_config(config: Mapping[str, Any], where: str) -> T5Config:
    """The encoder that a ``config.json`` describes.

    Unknown settings are ignored, because transformers writes many that concern other uses.

    Raises:
        ModelError: a setting is not supported or out of range; the message names it.
    """
    relevant = {name: value for name, value in config.items() if name in SETTINGS.known}
    settings = SETTINGS.read(relevant, where)
    kind = settings.feed_forward_proj
    if "model_type" not in config or kind not in FEED_FORWARD:
        raise ModelError(
            f"{where}: model_type is {config.get('model_type')!r} and feed_forward_proj {kind!r}, "
            f"only 't5' and 'umt5' with {' or '.join(map(repr, FEED_FORWARD))} is supported"
        )
    if max(settings.eos, settings.pad) >= settings.vocabulary:
        raise ModelError(
            f"{where}: eos_token_id and pad_token_id must be tokens, got {settings.eos} and "
            f"{settings.pad}"
        )
    if settings.buckets % 4:
        raise ModelError(f"{where}: relative_attention_num_buckets must be a multiple of 4")
    if settings.furthest <= settings.buckets // 4:
        raise ModelError(
            f"{where}: relative_attention_max_distance must be more than a quarter of "
            "relative_attention_num_buckets"
        )
    return settings


def text_encoder_kind(config: T5Config, spec: ModelSpec, length: int) -> GraphKind:
    """The graph of the encoder, for prompts of ``length`` tokens with padding.

    Inputs: tokens (K, L) int64, mask (K, L) float32. Outputs: embeds (K, L, C) float32.
    """
    examples = Examples(spec, torch.float32)
    module = empty_module(lambda: T5Encoder(config, length), torch.float32, examples.generator)
    tokens = torch.randint(config.vocabulary, (2, length), generator=examples.generator)
    mask = (torch.arange(length) < torch.tensor([[max(1, length // 3)], [length]])).float()
    inputs = (Input("tokens", tokens, {0: "captions"}), Input("mask", mask, {0: "captions"}))
    copies = {TEXT_ENCODER: same_names(module)}
    return GraphKind(TEXT_ENCODER, module, inputs, ("embeds",), copies, weights_are_inputs=True)


def position_buckets(length: int, buckets: int, furthest: int) -> Tensor:
    """The bucket of each query (row) and key (column): (length, length) int64.

    Half of the buckets are for keys after the query. In each half, a bucket holds a single distance
    up to a quarter of ``buckets``; the others grow logarithmically up to ``furthest``.
    """
    offset = torch.arange(length)[None, :] - torch.arange(length)[:, None]
    half, exact = buckets // 2, buckets // 4
    distance = offset.abs()
    growth = torch.log(distance.clamp(min=1).float() / exact) / math.log(furthest / exact)
    far = (exact + (growth * (half - exact)).long()).clamp(max=half - 1)
    return half * (offset > 0) + torch.where(distance < exact, distance, far)


class Plain(nn.Module):
    """A matrix without bias, applied to rows."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(after, before))

    def forward(self, rows: Tensor) -> Tensor:
        """(n, before) to (n, after)."""
        # With a bias of zeros, the ONNX graph is one Gemm.
        return F.linear(rows, self.weight, torch.zeros(self.weight.shape[0]))


class Norm(nn.Module):
    """Root mean square norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        """(n, width) to (n, width)."""
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


class SelfAttention(nn.Module):
    """Attention without scaling of the scores; the first layer of a T5 has the biases of all."""

    def __init__(self, config: T5Config, *, has_biases: bool) -> None:
        super().__init__()
        self.heads, inner = config.heads, config.heads * config.head
        self.q, self.k, self.v = (Plain(config.width, inner) for _ in range(3))
        self.o = Plain(inner, config.width)
        if has_biases:
            self.relative_attention_bias = nn.Embedding(config.buckets, config.heads)

    def forward(self, x: Tensor, shape: tuple[int, int], bias: Tensor) -> Tensor:
        """(K*L, C) of texts of ``shape`` (K, L), and bias (K or 1, heads, L, L), to (K*L, C)."""
        q, k, v = (
            p(x).reshape(*shape, self.heads, -1).transpose(1, 2) for p in (self.q, self.k, self.v)
        )
        # (K, heads, L, L)
        weights = torch.softmax(torch.matmul(q, k.transpose(-1, -2)) + bias, dim=-1)
        mixed = torch.matmul(weights, v).transpose(1, 2)
        return self.o(mixed.reshape(x.shape[0], -1))


class FeedForward(nn.Module):
    """Two layers with ReLU, or with a GELU gate."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.gated = config.gated
        for name in ("wi_0", "wi_1") if config.gated else ("wi",):
            self.add_module(name, Plain(config.width, config.inner))
        self.wo = Plain(config.inner, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """(n, width) to (n, width)."""
        first = self.get_submodule("wi_0" if self.gated else "wi")(x)
        if self.gated:
            return self.wo(F.gelu(first, approximate="tanh") * self.get_submodule("wi_1")(x))
        return self.wo(F.relu(first))


class Layer(nn.Module):
    """A norm and the branch after it; ``name`` is the name of the branch in transformers."""

    def __init__(self, name: str, branch: nn.Module, width: int) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, branch)
        self.layer_norm = Norm(width)

    @property
    def branch(self) -> nn.Module:
        """The attention or the feed-forward layers."""
        return self.get_submodule(self.name)


class Block(nn.Module):
    """Attention, followed by the feed-forward layers."""

    def __init__(self, config: T5Config, *, has_biases: bool) -> None:
        super().__init__()
        attention = SelfAttention(config, has_biases=has_biases)
        self.layer = nn.ModuleList(
            [
                Layer("SelfAttention", attention, config.width),
                Layer("DenseReluDense", FeedForward(config), config.width),
            ]
        )


class Stack(nn.Module):
    """The blocks, under the names of the state dict."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            Block(config, has_biases=i == 0 or config.biases_per_layer)
            for i in range(config.layers)
        )
        self.final_layer_norm = Norm(config.width)

    @property
    def branches(self) -> list[tuple[Any, Any]]:
        """The attention layer and the feed-forward layer of each block."""
        return [(block.layer[0], block.layer[1]) for block in self.block]  # type: ignore[index]


class T5Encoder(nn.Module):
    """Tokens and mask to embeddings, for texts of ``length`` tokens with padding."""

    def __init__(self, config: T5Config, length: int) -> None:
        super().__init__()
        self.zero_padding = config.biases_per_layer
        with torch.device("cpu"):  # a constant of the graph, also in a module without storage
            buckets = position_buckets(length, config.buckets, config.furthest)
        self.buckets = buckets.numpy().astype(np.int32)
        self.shared = nn.Embedding(config.vocabulary, config.width)
        self.encoder = Stack(config)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Tokens (K, L) int64 and mask (K, L) float32 to embeddings (K, L, C) float32."""
        count, length = tokens.shape
        x = self.shared(tokens.reshape(-1))  # (K*L, C)
        # A zero that depends on the input, so that the ONNX optimizer folds nothing here.
        buckets = torch.from_numpy(self.buckets) + (tokens[:1, :1] < 0).int()
        padding = PADDING_SCORE * (1 - mask)[:, None, None]
        for attention, feed_forward in self.encoder.branches:
            if hasattr(attention.branch, "relative_attention_bias"):
                table = attention.branch.relative_attention_bias
                bias = table(buckets).permute(2, 0, 1)[None] + padding
            x = x + attention.branch(attention.layer_norm(x), (count, length), bias)
            x = x + feed_forward.branch(feed_forward.layer_norm(x))
        embeds = self.encoder.final_layer_norm(x).reshape(count, length, -1)
        # Models that were trained with UMT5 see zeros after the text, and no mask.
        return embeds * mask[..., None] if self.zero_padding else embeds
