"""Wan 2.1 and 2.2 as exported graphs: text to video with self-attention over space and time.

The timestep embedding and all modulation are hoisted out of the step loop, as in PixArt. The text
projection and the keys and values of every block are computed once per caption. Queries and keys
are normalised over their whole width and turned by the position of their token (frame, row,
column). Captions are not masked: the zeros behind a short one are read as tokens.

Source: Wan Team, "Wan: Open and Advanced Large-Scale Video Generative Models", 2025, section 4.2;
names and arithmetic are those of diffusers' ``WanTransformer3DModel``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from goc_deploy.errors import ModelError
from goc_deploy.exporters.architectures import any_size
from goc_deploy.exporters.architectures.contract import Architecture, DiffusersFolder
from goc_deploy.exporters.architectures.dit import MlpUnit, add_gated, scaled_queries
from goc_deploy.exporters.architectures.dit_model import modulate
from goc_deploy.exporters.architectures.pixart import CaptionProjection, ConditioningUnit
from goc_deploy.exporters.architectures.wan_authors import AUTHORS, layers_of_authors
from goc_deploy.exporters.architectures.wan_diffusers import (
    check_tensors,
    spec_from_config,
    spec_of,
)
from goc_deploy.exporters.tracing import (
    KINDS,
    ROWS,
    SOME_TOKENS,
    STEPS,
    Examples,
    layers_of,
)
from goc_deploy.exporters.units import DTYPES, Binding, GraphKind, Input, Slab
from goc_deploy.precision import Precision
from goc_deploy.spec import ModelSpec

NORM_EPSILON = 1e-6
HEAD = 128  # width of a head in every public model


def spec_from_tensors(tensors: Mapping[str, Tensor], heads: int | None) -> ModelSpec:
    """Infer the sizes of a model from its tensors.

    Raises:
        ModelError: the sizes cannot be read, or the number of heads does not divide the width.
    """
    try:
        hidden, channels = tensors["patch_embedding.weight"].shape[:2]
        text = tensors["condition_embedder.text_embedder.linear_1.weight"].shape[1]
        ffn = tensors["blocks.0.ffn.net.0.proj.weight"].shape[0]
        depth = 1 + max(int(m[1]) for m in map(re.compile(r"blocks\.(\d+)\.").match, tensors) if m)
    except (KeyError, ValueError) as cause:
        raise ModelError(
            f"the checkpoint looks like a Wan but its sizes cannot be read: {cause}"
        ) from cause
    heads = heads or hidden // HEAD
    if not heads or hidden % (2 * heads):
        raise ModelError(
            f"the width {hidden} cannot be split into {heads} heads of an even width; give another "
            "`num_heads`"
        )
    return spec_of(depth, heads, hidden // heads, ffn=ffn, channels=channels, text=text)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float = NORM_EPSILON) -> Tensor:
    """RMS norm over the last dimension; the mean is computed in float32.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", NeurIPS 2019, equation 4.
    """
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return (wide * scale).to(x.dtype) * weight  # a widened weight would be folded to a constant


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs of neighbouring values by their angles, in float32.

    Args:
        x: (B, heads, T, head width).
        cos: (T, head width / 2) float32.
        sin: (T, head width / 2) float32.
    """
    even, odd = x.float().reshape(*x.shape[:-1], -1, 2).unbind(-1)
    pairs = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return pairs.flatten(-2).to(x.dtype)


class AttnUnit(nn.Module):
    """The unit of a self-attention branch."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.heads = spec.heads
        self.qkv = nn.Linear(spec.hidden, 3 * spec.hidden)
        self.norm_q = nn.Parameter(torch.empty(spec.hidden))
        self.norm_k = nn.Parameter(torch.empty(spec.hidden))
        self.proj = nn.Linear(spec.hidden, spec.hidden)

    def forward(
        self, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Tokens, modulation and angles to x_out (B, T, D) and feature (B*T, D).

        Args:
            x: (B, T, D).
            shift: (B, D).
            scale: (B, D).
            gate: (B, D).
            cos: (T, head width / 2) float32.
            sin: (T, head width / 2) float32.
        """
        q, k, v = self._heads(x, shift, scale, cos, sin)
        scores = torch.matmul(scaled_queries(q), k.transpose(-1, -2))  # (B, heads, T, T)
        weights = torch.softmax(scores.float(), dim=-1).to(x.dtype)
        mixed = torch.matmul(weights, v).transpose(1, 2).reshape(-1, x.shape[-1])  # (B*T, D)
        feature = self.proj(mixed)
        return add_gated(x, gate, feature.reshape(x.shape)), feature

    def reference(
        self, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The same tensors, computed with PyTorch's attention."""
        q, k, v = self._heads(x, shift, scale, cos, sin)
        mixed = F.scaled_dot_product_attention(q, k, v)
        feature = self.proj(mixed.transpose(1, 2).reshape(-1, x.shape[-1]))
        return x + gate.unsqueeze(1) * feature.reshape(x.shape), feature

    def _heads(
        self, x: Tensor, shift: Tensor, scale: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (B, heads, T, head width) each."""
        batch, tokens, hidden = x.shape
        joined = self.qkv(modulate(x, shift, scale).reshape(-1, hidden))  # (B*T, 3*D)
        q, k, v = joined.chunk(3, dim=-1)
        q, k = rms_norm(q, self.norm_q), rms_norm(k, self.norm_k)
        shape = (batch, tokens, self.heads, hidden // self.heads)
        q, k, v = (part.reshape(shape).transpose(1, 2) for part in (q, k, v))
        return turned(q, cos, sin), turned(k, cos, sin), v


class CrossUnit(nn.Module):
    """The unit of a cross-attention branch, which has a layer norm with weights."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.heads = spec.heads
        self.norm = nn.LayerNorm(spec.hidden, eps=NORM_EPSILON)
        self.q_linear = nn.Linear(spec.hidden, spec.hidden)
        self.norm_q = nn.Parameter(torch.empty(spec.hidden))
        self.proj = nn.Linear(spec.hidden, spec.hidden)

    def forward(
        self, x: Tensor, keys: Tensor, values: Tensor, caption_rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Tokens and captions to x_out (B, T, D) and feature (B*T, D).

        Args:
            x: (B, T, D).
            keys: (K, heads, Lc, head width).
            values: (K, heads, Lc, head width).
            caption_rows: (B,) int64, the caption of each row.
        """
        k, v = keys.index_select(0, caption_rows), values.index_select(0, caption_rows)
        q = self._queries(x)
        scores = torch.matmul(scaled_queries(q), k.transpose(-1, -2))
        weights = torch.softmax(scores.float(), dim=-1).to(x.dtype)
        mixed = torch.matmul(weights, v).transpose(1, 2).reshape(-1, x.shape[-1])
        feature = self.proj(mixed)
        return (x.float() + feature.reshape(x.shape).float()).to(x.dtype), feature

    def reference(
        self, x: Tensor, keys: Tensor, values: Tensor, caption_rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The same tensors, computed with PyTorch's attention."""
        k, v = keys[caption_rows], values[caption_rows]
        mixed = F.scaled_dot_product_attention(self._queries(x), k, v)
        feature = self.proj(mixed.transpose(1, 2).reshape(-1, x.shape[-1]))
        return x + feature.reshape(x.shape), feature

    def _queries(self, x: Tensor) -> Tensor:
        """Tokens (B, T, D) to queries (B, heads, T, head width)."""
        batch, tokens, hidden = x.shape
        normal = F.layer_norm(x.float(), (hidden,), eps=NORM_EPSILON).to(x.dtype)
        placed = normal * self.norm.weight + self.norm.bias
        q = rms_norm(self.q_linear(placed.reshape(-1, hidden)), self.norm_q)
        return q.reshape(batch, tokens, self.heads, hidden // self.heads).transpose(1, 2)


class CaptionsUnit(nn.Module):
    """Captions to the keys and values of every block."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.depth, self.heads = spec.depth, spec.heads
        self.y_proj = CaptionProjection(spec)
        self.kv_linear = nn.Linear(spec.hidden, 2 * spec.depth * spec.hidden)
        self.norm_k = nn.Parameter(torch.empty(spec.depth, spec.hidden))

    def forward(self, captions: Tensor) -> Tensor:
        """Captions (R, Lc, C) float32 to keys and values (2L, R, heads, Lc, head width)."""
        rows, tokens, width = captions.shape
        narrow = captions.reshape(-1, width).to(self.kv_linear.weight.dtype)
        projected = self.y_proj(narrow)  # (R*Lc, D)
        hidden = projected.shape[-1]
        both = self.kv_linear(projected).reshape(rows, tokens, self.depth, 2, hidden)
        keys, values = both.unbind(3)  # (R, Lc, L, D)
        whole = torch.stack([rms_norm(keys, self.norm_k), values], dim=3)
        split = whole.reshape(rows, tokens, 2 * self.depth, self.heads, hidden // self.heads)
        return split.permute(2, 0, 3, 1, 4)


def graph_kinds(spec: ModelSpec, precision: Precision) -> tuple[GraphKind, ...]:
    """The graphs of a Wan, in the order in which they are written."""
    examples = Examples(spec, DTYPES[precision])
    modulation = examples.modulation("shift", "scale", "gate")
    outputs = ("x_out", "feature")
    return (
        GraphKind(
            "conditioning",
            examples.module(ConditioningUnit),
            (STEPS,),
            ("table",),
            {"conditioning": _conditioning(spec)},
            weights_are_inputs=True,
        ),
        GraphKind(
            "captions",
            examples.module(CaptionsUnit),
            (_captions_example(spec, examples),),
            ("keys_values",),
            {"captions": _captions(spec)},
            weights_are_inputs=True,
        ),
        GraphKind(
            "embed",
            examples.module(any_size.EmbedUnit),
            (any_size.latents_example(spec, examples), ROWS),
            ("x",),
            {"embed": layers_of({"x_embedder.proj": "patch_embedding"})},
        ),
        GraphKind(
            "attn",
            examples.module(AttnUnit),
            (examples.tokens(), *modulation, *_angles(spec)),
            outputs,
            {f"block_{i:02d}_attn": _attn(f"blocks.{i}") for i in range(spec.depth)},
        ),
        GraphKind(
            "cross",
            examples.module(CrossUnit),
            (examples.tokens(), *_caption_examples(spec, examples)),
            outputs,
            {f"block_{i:02d}_cross": _cross(f"blocks.{i}") for i in range(spec.depth)},
        ),
        GraphKind(
            "mlp",
            examples.module(MlpUnit),
            (examples.tokens(), *modulation),
            outputs,
            {f"block_{i:02d}_mlp": _mlp(f"blocks.{i}") for i in range(spec.depth)},
        ),
        GraphKind(
            "final",
            examples.module(any_size.FinalUnit),
            (any_size.grid_example(spec, examples), *examples.modulation("shift", "scale")),
            ("prediction",),
            {"final": layers_of({"linear": "proj_out"})},
        ),
    )


def _angles(spec: ModelSpec) -> tuple[Input, ...]:
    """``cos`` and ``sin`` of the example tokens."""
    angles = torch.linspace(0, 3, SOME_TOKENS)[:, None] * torch.linspace(
        1, 0.1, spec.hidden // spec.heads // 2
    )
    return (
        Input("cos", angles.cos(), {0: "tokens"}),
        Input("sin", angles.sin(), {0: "tokens"}),
    )


def _captions_example(spec: ModelSpec, examples: Examples) -> Input:
    shape = (2, spec.caption_tokens, spec.caption_channels)
    return Input("captions", examples.normal(*shape, dtype=torch.float32), {0: "captions"})


def _caption_examples(spec: ModelSpec, examples: Examples) -> tuple[Input, ...]:
    """Keys, values and the caption of each row."""
    shape = (2, spec.heads, spec.caption_tokens, spec.hidden // spec.heads)
    return (
        Input("keys", examples.normal(*shape), {0: "captions"}),
        Input("values", examples.normal(*shape), {0: "captions"}),
        Input("caption_rows", torch.tensor([1, 0]), {0: "batch"}),
    )


def _conditioning(spec: ModelSpec) -> Binding:
    embedder = "condition_embedder"
    layers = {
        "t_embedder.mlp.0": f"{embedder}.time_embedder.linear_1",
        "t_embedder.mlp.2": f"{embedder}.time_embedder.linear_2",
        "t_block": f"{embedder}.time_proj",
    }
    tables = tuple(Slab(f"blocks.{i}.scale_shift_table") for i in range(spec.depth))
    return {
        **layers_of(layers),
        "block_tables": tables,
        "final_table": (Slab("scale_shift_table"),),
    }


def _captions(spec: ModelSpec) -> Binding:
    """Bind the projection, and the key and value layers of all blocks as one matrix."""
    text, blocks = "condition_embedder.text_embedder", range(spec.depth)
    binding = layers_of({f"y_proj.fc{i}": f"{text}.linear_{i}" for i in (1, 2)})
    for kind in KINDS:
        binding[f"kv_linear.{kind}"] = tuple(
            Slab(f"blocks.{i}.attn2.to_{part}.{kind}") for i in blocks for part in "kv"
        )
    binding["norm_k"] = tuple(Slab(f"blocks.{i}.attn2.norm_k.weight") for i in blocks)
    return binding


def _attn(block: str) -> Binding:
    binding = layers_of({"proj": f"{block}.attn1.to_out.0"})
    for kind in KINDS:
        binding[f"qkv.{kind}"] = tuple(Slab(f"{block}.attn1.to_{part}.{kind}") for part in "qkv")
    norms = {f"norm_{part}": (Slab(f"{block}.attn1.norm_{part}.weight"),) for part in "qk"}
    return binding | norms


def _cross(block: str) -> Binding:
    attn = f"{block}.attn2"
    names = {"norm": f"{block}.norm2", "q_linear": f"{attn}.to_q", "proj": f"{attn}.to_out.0"}
    return {**layers_of(names), "norm_q": (Slab(f"{attn}.norm_q.weight"),)}


def _mlp(block: str) -> Binding:
    return layers_of({"mlp.fc1": f"{block}.ffn.net.0.proj", "mlp.fc2": f"{block}.ffn.net.2"})


WAN = Architecture(
    "wan",
    frozenset({"patch_embedding.weight", "condition_embedder.time_proj.weight"}),
    spec_from_tensors,
    check_tensors,
    graph_kinds,
    folder=DiffusersFolder(
        ("WanPipeline",), "WanTransformer3DModel", spec_from_config, layers=layers_of_authors
    ),
    other_layout=AUTHORS,
    sensitive=("first:3", "last:3"),  # as in the presets of NVIDIA's Model Optimizer
)
