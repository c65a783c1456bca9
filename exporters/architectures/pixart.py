"""PixArt-alpha as exported graphs: the attention and MLP of DiT, and cross-attention to a caption.

The timestep embedding and all modulation are hoisted out of the step loop (adaLN-single: one layer
for all blocks plus a table per block). They do not depend on the caption, so the modulation table
has one row. The caption projection and the keys and values of every block are computed once per
caption. A cross-attention branch has no modulation; its gate is 1. Parameter names follow the
public checkpoints.

Source: Chen et al., "PixArt-alpha: Fast Training of Diffusion Transformer for Photorealistic
Text-to-Image Synthesis", ICLR 2024, section 2.3 and figure 4.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from goc_deploy.blocks import MAX_BLOCKS
from goc_deploy.conditions.captions import MASKED
from goc_deploy.errors import ModelError
from goc_deploy.exporters.architectures.contract import Architecture, DiffusersFolder
from goc_deploy.exporters.architectures.dit import (
    GATE_ATTN,
    GATE_MLP,
    HEADS_OF_KNOWN_SIZES,
    SCALE_ATTN,
    SCALE_MLP,
    SHIFT_ATTN,
    SHIFT_MLP,
    AttnUnit,
    EmbedUnit,
    FinalUnit,
    MlpUnit,
    embed_kind,
    final_kind,
    scaled_queries,
)
from goc_deploy.exporters.architectures.dit_model import (
    TIMESTEP_FREQUENCIES,
    Attention,
    Mlp,
    PatchEmbed,
    TimestepEmbed,
    timestep_features,
)
from goc_deploy.exporters.architectures.pixart_diffusers import (
    BRANCHES,
    PIXELS_PER_LATENT,
    ROWS_OF_BRANCHES,
    SIGMA,
    SIGMA_TOKENS,
    TOKENS,
    layers_in_diffusers,
    spec_from_config,
    state_from_diffusers,
    stretch,
)
from goc_deploy.exporters.architectures.sizes import sizes_from_tensors
from goc_deploy.exporters.tracing import (
    STEPS,
    Examples,
    block_copies,
    check_shapes,
    same_names,
    shapes_of,
)
from goc_deploy.exporters.units import DTYPES, GraphKind, Input, Slab
from goc_deploy.precision import Precision
from goc_deploy.spec import ModelSpec, Positions

TOLD_SIZE = Input("told_size", torch.tensor([512.0, 768.0]), {})
NULL_CAPTION = "y_embedder.y_embedding"  # not used by the reference pipeline of diffusers


def spec_from_tensors(tensors: Mapping[str, Tensor], heads: int | None) -> ModelSpec:
    """Infer the sizes of a model from its tensors.

    Raises:
        ModelError: the sizes are not consistent, or the number of heads cannot be inferred.
    """
    sizes = sizes_from_tensors(tensors, "PixArt", "y_embedder.y_proj.fc1.weight")
    hidden, patch, channels = sizes.hidden, sizes.patch, sizes.channels
    if sizes.grid**2 != sizes.tokens or sizes.ratio not in (1, 2) or sizes.depth > MAX_BLOCKS:
        raise ModelError(
            f"the checkpoint has {sizes.tokens} tokens, {sizes.depth} blocks and predicts "
            f"{sizes.predicted} values per token; supported are "
            f"square samples, {MAX_BLOCKS} blocks at most, and {patch**2 * channels} values (or "
            "twice that, with sigma)"
        )
    heads = heads or HEADS_OF_KNOWN_SIZES.get(hidden)
    if heads is None or hidden % heads:
        raise ModelError(
            f"the width {hidden} does not tell the number of attention heads; give `num_heads`"
        )
    null = tensors.get(NULL_CAPTION)
    caption_tokens = TOKENS if null is None else null.shape[0]
    is_told = "csize_embedder.mlp.0.weight" in tensors
    return ModelSpec(
        depth=sizes.depth,
        hidden=hidden,
        heads=heads,
        mlp_hidden=sizes.mlp_hidden,
        patch=patch,
        grid=sizes.grid,
        channels=channels,
        choices=0,
        learn_sigma=sizes.ratio == 2,
        architecture=SIGMA if caption_tokens == SIGMA_TOKENS and not is_told else "pixart",
        branches=BRANCHES,
        rows=ROWS_OF_BRANCHES,
        guided_channels=channels,
        caption_channels=sizes.own[1],
        caption_tokens=caption_tokens,
        told_size=sizes.grid * patch * PIXELS_PER_LATENT if is_told else 0,
    )


class SizeEmbed(nn.Module):
    """Numbers that describe an image to a part of the condition vector."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(TIMESTEP_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width)
        )

    def forward(self, numbers: Tensor) -> Tensor:
        """Numbers (n,) float32 to their joined embeddings (1, n * width)."""
        features = timestep_features(numbers).to(next(self.parameters()).dtype)
        return self.mlp(features).reshape(1, -1)


class CrossAttention(nn.Module):
    """The layers of cross-attention, under the names of the public layout."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.q_linear = nn.Linear(hidden, hidden)
        self.kv_linear = nn.Linear(hidden, 2 * hidden)
        self.proj = nn.Linear(hidden, hidden)


class CaptionProjection(nn.Module):
    """Two linear layers with tanh-approximated GELU between them."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.fc1 = nn.Linear(spec.caption_channels, spec.hidden)
        self.fc2 = nn.Linear(spec.hidden, spec.hidden)

    def forward(self, captions: Tensor) -> Tensor:
        """Caption tokens (n, caption channels) to (n, D)."""
        return self.fc2(F.gelu(self.fc1(captions), approximate="tanh"))


class ConditioningUnit(nn.Module):
    """Timesteps to the modulation table, the same for every caption."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.told_size, self.modulation_rows = float(spec.told_size), spec.modulation
        self.t_embedder = TimestepEmbed(spec)
        self.t_block = nn.Linear(spec.hidden, 6 * spec.hidden)
        self.block_tables = nn.Parameter(torch.empty(spec.depth, 6, spec.hidden))
        self.final_table = nn.Parameter(torch.empty(1, 2, spec.hidden))
        if spec.told_size:
            self.csize_embedder, self.ar_embedder = (
                SizeEmbed(spec.hidden // 3),
                SizeEmbed(spec.hidden // 3),
            )

    def forward(self, t: Tensor, told_size: Tensor | None = None) -> Tensor:
        """Timesteps to the modulation table.

        Args:
            t: (S,) timesteps.
            told_size: (2,) float32, height and width of the image in pixels; None if the model is
                not told, or only draws one size.

        Returns:
            The table (S, M, 1, D).
        """
        condition = self.t_embedder(t)  # (S, D)
        if self.told_size:
            if told_size is None:
                # A zero that depends on the input, so that the ONNX optimizer folds nothing here.
                side = self.told_size + (t[:1] < 0).float()
                told_size = torch.cat([side, side])
            size = self.csize_embedder(told_size)  # (1, 2 * D / 3)
            ratio = self.ar_embedder(told_size[:1] / told_size[1:])
            condition = condition + torch.cat([size, ratio], dim=1)
        steps, hidden = condition.shape
        shared = self.t_block(F.silu(condition)).reshape(steps, 1, 6, hidden)
        own = shared + self.block_tables  # (S, L, 6, D)
        one = torch.ones_like(own[:, :, 0])  # gate of the cross-attention branch
        gates = torch.stack([own[:, :, GATE_ATTN], one, own[:, :, GATE_MLP]], dim=2)
        rest = (SHIFT_ATTN, SCALE_ATTN, SHIFT_MLP, SCALE_MLP)
        shifts = torch.stack([own[:, :, chunk] for chunk in rest], dim=2)
        last = condition.unsqueeze(1) + self.final_table  # (S, 2, D)
        parts = self.modulation_rows.in_order(gates=gates, final=last, units=shifts)
        table = torch.cat([part.reshape(steps, -1, hidden) for part in parts], dim=1)
        return table.unsqueeze(2)  # (S, M, 1, D)


class CaptionsUnit(nn.Module):
    """Captions to the keys and values of every block."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.heads = spec.heads
        self.y_proj = CaptionProjection(spec)
        self.kv_linear = nn.Linear(spec.hidden, 2 * spec.depth * spec.hidden)

    def forward(self, captions: Tensor) -> Tensor:
        """Captions (R, Lc, C) float32 to keys and values (2L, R, heads, Lc, head width)."""
        rows, tokens, width = captions.shape
        narrow = captions.reshape(-1, width).to(self.kv_linear.weight.dtype)
        projected = self.y_proj(narrow)  # (R*Lc, D)
        head = projected.shape[-1] // self.heads
        both = self.kv_linear(projected).reshape(rows, tokens, -1, self.heads, head)
        return both.permute(2, 0, 3, 1, 4)


class CrossUnit(nn.Module):
    """The unit of a cross-attention branch."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.heads = spec.heads
        self.cross_attn = nn.ModuleDict(
            {name: nn.Linear(spec.hidden, spec.hidden) for name in ("q_linear", "proj")}
        )

    def forward(
        self, x: Tensor, keys: Tensor, values: Tensor, bias: Tensor, caption_rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Tokens and captions to x_out (B, T, D) and feature (B*T, D).

        Args:
            x: (B, T, D).
            keys: (K, heads, Lc, head width).
            values: (K, heads, Lc, head width).
            bias: (K, Lc) float32, added to the scores.
            caption_rows: (B,) int64, the caption of each row.
        """
        # (B, heads, Lc, head width)
        k, v = keys.index_select(0, caption_rows), values.index_select(0, caption_rows)
        q = scaled_queries(self._queries(x))
        scores = (
            torch.matmul(q, k.transpose(-1, -2)).float()
            + bias.index_select(0, caption_rows)[:, None, None]
        )
        mixed = torch.matmul(torch.softmax(scores, dim=-1).to(x.dtype), v)
        feature = self.cross_attn["proj"](mixed.transpose(1, 2).reshape(-1, x.shape[-1]))
        return (x.float() + feature.reshape(x.shape).float()).to(x.dtype), feature

    def reference(
        self, x: Tensor, keys: Tensor, values: Tensor, bias: Tensor, caption_rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The same tensors, computed with PyTorch's attention."""
        k, v, mask = keys[caption_rows], values[caption_rows], bias[caption_rows][:, None, None]
        mixed = F.scaled_dot_product_attention(self._queries(x), k, v, attn_mask=mask)
        feature = self.cross_attn["proj"](mixed.transpose(1, 2).reshape(-1, x.shape[-1]))
        return x + feature.reshape(x.shape), feature

    def _queries(self, x: Tensor) -> Tensor:
        """Tokens (B, T, D) to queries (B, heads, T, head width)."""
        batch, tokens, hidden = x.shape
        q = self.cross_attn["q_linear"](x.reshape(-1, hidden))
        return q.reshape(batch, tokens, self.heads, hidden // self.heads).transpose(1, 2)


class PublicLayout(nn.Module):
    """Names and shapes of the public checkpoints. This module is never run."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        embed, conditioning = EmbedUnit(spec), ConditioningUnit(spec)
        self.x_embedder, self.pos_embed = PatchEmbed(spec), embed.pos_embed
        self.t_embedder = conditioning.t_embedder
        self.t_block = nn.Sequential(nn.SiLU(), conditioning.t_block)
        if spec.told_size:
            self.csize_embedder, self.ar_embedder = (
                conditioning.csize_embedder,
                conditioning.ar_embedder,
            )
        self.y_embedder = nn.ModuleDict({"y_proj": CaptionProjection(spec)})
        self.blocks = nn.ModuleList(PublicBlock(spec) for _ in range(spec.depth))
        self.final_layer = FinalUnit(spec)
        self.final_layer.scale_shift_table = nn.Parameter(torch.empty(2, spec.hidden))


class PublicBlock(nn.Module):
    """Names and shapes of a block. This module is never run."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.empty(6, spec.hidden))
        self.attn = Attention(spec.hidden, spec.heads)
        self.cross_attn = CrossAttention(spec.hidden)
        self.mlp = Mlp(spec.hidden, spec.mlp_hidden)


def check_tensors(tensors: Mapping[str, Tensor], spec: ModelSpec) -> None:
    """Check that names and shapes of tensors are those of the architecture.

    Raises:
        ModelError: tensors are missing, unexpected or of another shape; the message lists up to ten
            of each.
    """
    used = {name: tensor for name, tensor in tensors.items() if name != NULL_CAPTION}
    what = f"a PixArt of depth {spec.depth} and width {spec.hidden}"
    check_shapes(used, shapes_of(lambda: PublicLayout(spec)), what)


def graph_kinds(spec: ModelSpec, precision: Precision) -> tuple[GraphKind, ...]:
    """The graphs of a PixArt, in the order in which they are written."""
    examples = Examples(spec, DTYPES[precision])
    conditioning, captions = examples.module(ConditioningUnit), examples.module(CaptionsUnit)
    attn, cross, mlp = (
        examples.module(AttnUnit),
        examples.module(CrossUnit),
        examples.module(MlpUnit),
    )
    length, head = spec.caption_tokens, spec.hidden // spec.heads
    by_caption = {0: "captions"}
    example = examples.normal(2, length, spec.caption_channels, dtype=torch.float32)
    bias = MASKED * (torch.arange(length) > torch.tensor([[length // 2], [length]])).float()
    of_caption = (
        Input("keys", examples.normal(2, spec.heads, length, head), by_caption),
        Input("values", examples.normal(2, spec.heads, length, head), by_caption),
        Input("bias", bias, by_caption),
        Input("caption_rows", torch.tensor([1, 0]), {0: "batch"}),
    )
    told = (TOLD_SIZE,) if spec.told_size and spec.any_size else ()
    branch = (examples.tokens(), *examples.modulation("shift", "scale", "gate"))
    outputs = ("x_out", "feature")
    return (
        GraphKind(
            "conditioning",
            conditioning,
            (STEPS, *told),
            ("table",),
            {"conditioning": _conditioning(conditioning, spec)},
            weights_are_inputs=True,
        ),
        GraphKind(
            "captions",
            captions,
            (Input("captions", example, by_caption),),
            ("keys_values",),
            {"captions": _captions(captions, spec)},
            weights_are_inputs=True,
        ),
        embed_kind(spec, examples),
        GraphKind("attn", attn, branch, outputs, block_copies(attn, spec.depth, "attn")),
        GraphKind(
            "cross",
            cross,
            (examples.tokens(), *of_caption),
            outputs,
            block_copies(cross, spec.depth, "cross"),
        ),
        GraphKind("mlp", mlp, branch, outputs, block_copies(mlp, spec.depth, "mlp")),
        final_kind(spec, examples),
    )


def positions(spec: ModelSpec) -> Positions:
    """The positions of the reference, which stretches the table for large samples."""
    return Positions("sine", base=spec.axes[0], stretch=stretch(spec.side))


def _conditioning(module: nn.Module, spec: ModelSpec) -> dict[str, tuple[Slab, ...]]:
    binding = same_names(module)
    for kind in ("weight", "bias"):
        binding[f"t_block.{kind}"] = (Slab(f"t_block.1.{kind}"),)
    binding["block_tables"] = tuple(
        Slab(f"blocks.{block}.scale_shift_table") for block in range(spec.depth)
    )
    binding["final_table"] = (Slab("final_layer.scale_shift_table"),)
    return binding


def _captions(module: nn.Module, spec: ModelSpec) -> dict[str, tuple[Slab, ...]]:
    """Bind the projection, and the key and value layers of all blocks as one matrix."""
    binding = same_names(module, "y_embedder.")
    for kind in ("weight", "bias"):
        blocks = range(spec.depth)
        binding[f"kv_linear.{kind}"] = tuple(
            Slab(f"blocks.{block}.cross_attn.kv_linear.{kind}") for block in blocks
        )
    return binding


PIXART = Architecture(
    "pixart",
    frozenset({"x_embedder.proj.weight", "t_block.1.weight", "y_embedder.y_proj.fc1.weight"}),
    spec_from_tensors,
    check_tensors,
    graph_kinds,
    positions,
    DiffusersFolder(
        ("PixArtAlphaPipeline",),
        "PixArtTransformer2DModel",
        spec_from_config,
        state_from_diffusers,
        "ada_norm_single",
        layers_in_diffusers,
    ),
)
