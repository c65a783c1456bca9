"""DiT as exported graphs: the units of the blocks, and the graphs around them.

The timestep and label embeddings and every adaLN modulation are hoisted out of the step loop: they
are one matrix product over steps and distinct labels. `goc_deploy.modulation.ModulationRows`
defines the order of the rows of the resulting table.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain

import torch
from torch import Tensor, nn

from goc_deploy.blocks import MAX_BLOCKS
from goc_deploy.errors import ModelError
from goc_deploy.exporters.architectures import any_size
from goc_deploy.exporters.architectures.contract import Architecture, DiffusersFolder
from goc_deploy.exporters.architectures.dit_diffusers import (
    layers_in_diffusers,
    spec_from_config,
    state_from_diffusers,
)
from goc_deploy.exporters.architectures.dit_model import (
    Attention,
    DiT,
    LabelEmbed,
    Mlp,
    TimestepEmbed,
    adaln,
    modulate,
    unpatchify,
)
from goc_deploy.exporters.architectures.sizes import sizes_from_tensors
from goc_deploy.exporters.tracing import (
    ROWS,
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

HEADS_OF_KNOWN_SIZES = {384: 6, 768: 12, 1024: 16, 1152: 16}  # S, B, L, XL
SHIFT_ATTN, SCALE_ATTN, GATE_ATTN, SHIFT_MLP, SCALE_MLP, GATE_MLP = range(6)


def spec_from_tensors(tensors: Mapping[str, Tensor], heads: int | None) -> ModelSpec:
    """Infer the sizes of a model from its tensors.

    Raises:
        ModelError: the sizes are not consistent, or the number of heads cannot be inferred.
    """
    sizes = sizes_from_tensors(tensors, "DiT", "y_embedder.embedding_table.weight")
    hidden, patch, values = sizes.hidden, sizes.patch, sizes.patch**2 * sizes.channels
    if sizes.grid**2 != sizes.tokens or patch != sizes.patch_width:
        raise ModelError(
            f"only square samples and patches are supported; there are {sizes.tokens} tokens and "
            f"patches of {patch}x{sizes.patch_width}"
        )
    if sizes.own[0] < 2:
        raise ModelError(
            "the label table has one row, so there is no class besides the null label; give a "
            "conditional model"
        )
    if sizes.depth > MAX_BLOCKS:
        raise ModelError(
            f"the checkpoint has {sizes.depth} blocks, at most {MAX_BLOCKS} are supported"
        )
    if sizes.ratio not in (1, 2):
        raise ModelError(
            f"the final layer predicts {sizes.predicted} values per token, expected {values} (or "
            "twice that, with sigma)"
        )
    heads = heads or HEADS_OF_KNOWN_SIZES.get(hidden)
    if heads is None:
        raise ModelError(
            f"the number of attention heads cannot be read off a width of {hidden}; "
            "give `num_heads`"
        )
    if heads < 1 or hidden % heads:
        raise ModelError(
            f"{heads} heads do not divide the width {hidden}; give another `num_heads`"
        )
    return ModelSpec(
        depth=sizes.depth,
        hidden=hidden,
        heads=heads,
        mlp_hidden=sizes.mlp_hidden,
        patch=patch,
        grid=sizes.grid,
        channels=sizes.channels,
        choices=sizes.own[0] - 1,
        learn_sigma=sizes.ratio == 2,
    )


class ConditioningUnit(nn.Module):
    """Timesteps and labels to the modulation table."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.rows = spec.modulation.count
        self.t_embedder = TimestepEmbed(spec)
        self.y_embedder = LabelEmbed(spec)
        self.modulation = nn.Linear(spec.hidden, self.rows * spec.hidden)

    def forward(self, t: Tensor, labels: Tensor) -> Tensor:
        """Timesteps (S,) and labels (R,) to the table (S, M, R, D)."""
        # (S, R, D)
        condition = self.t_embedder(t).unsqueeze(1) + self.y_embedder(labels).unsqueeze(0)
        steps, rows, hidden = condition.shape
        table = self.modulation(nn.functional.silu(condition).reshape(-1, hidden))  # (S*R, M*D)
        return table.reshape(steps, rows, self.rows, hidden).transpose(1, 2)  # (S, M, R, D)


class PatchRows(nn.Module):
    """`PatchEmbed` as one matrix product.

    The matrix (D, C*p*p) has the memory layout of the kernel (D, C, p, p) of a checkpoint.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.proj = nn.Linear(spec.channels * spec.patch**2, spec.hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Latents (N, C, H, W) to tokens (N, T, D)."""
        (rows, columns), p, channels = self.spec.axes, self.spec.patch, self.spec.channels
        # (N, h, w, C, p, p)
        patches = x.reshape(-1, channels, rows, p, columns, p).permute(0, 2, 4, 1, 3, 5)
        tokens = self.proj(patches.reshape(-1, channels * p * p))  # (N*T, D)
        return tokens.reshape(-1, self.spec.tokens, self.spec.hidden)


class OwnConditioning(nn.Module):
    """The embedders and the modulation of a block that has its own embedders."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.t_embedder = TimestepEmbed(spec)
        self.y_embedder = LabelEmbed(spec)
        self.adaLN_modulation = adaln(spec.hidden, 6)

    def forward(self, t: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Timesteps (S,) and labels (R,) to conditions (S, R, D) and modulation (S, R, 6, D)."""
        # (S, R, D)
        condition = self.t_embedder(t).unsqueeze(1) + self.y_embedder(labels).unsqueeze(0)
        chunks = self.adaLN_modulation(condition.reshape(-1, condition.shape[-1]))  # (S*R, 6*D)
        return condition, chunks.reshape(*condition.shape[:2], 6, -1)


class BlockConditioningUnit(nn.Module):
    """`ConditioningUnit` of a model whose blocks have their own embedders.

    The parameters have the names of the public layout.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.modulation_rows = spec.modulation
        self.blocks = nn.ModuleList(OwnConditioning(spec) for _ in range(spec.depth))
        self.final_layer = nn.ModuleDict({"adaLN_modulation": adaln(spec.hidden, 2)})

    def forward(self, t: Tensor, labels: Tensor) -> Tensor:
        """Timesteps (S,) and labels (R,) to the table (S, M, R, D)."""
        conditions, chunks = zip(*(block(t, labels) for block in self.blocks), strict=True)
        steps, rows, hidden = conditions[0].shape
        last = self.final_layer["adaLN_modulation"](conditions[0].reshape(-1, hidden))  # (S*R, 2*D)
        of_blocks = torch.stack(chunks, dim=2)  # (S, R, L, 6, D)
        kinds = of_blocks.unbind(3)
        gates = torch.stack([kinds[GATE_ATTN], kinds[GATE_MLP]], dim=3)
        shifts = torch.stack(
            [kinds[chunk] for chunk in (SHIFT_ATTN, SCALE_ATTN, SHIFT_MLP, SCALE_MLP)], dim=3
        )
        parts = self.modulation_rows.in_order(gates=gates, final=last, units=shifts)
        table = torch.cat([part.reshape(steps, rows, -1, hidden) for part in parts], dim=2)
        return table.transpose(1, 2)  # (S, M, R, D)


class EmbedUnit(nn.Module):
    """Latents of one size to tokens, computed once per image and copied to the batch's rows."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        # Not a convolution: ONNX Runtime's CUDA provider has none in bf16 at opset 20.
        self.x_embedder = PatchRows(spec)
        self.pos_embed = nn.Parameter(torch.empty(1, spec.tokens, spec.hidden), requires_grad=False)

    def forward(self, latents: Tensor, rows: Tensor) -> Tensor:
        """Latents (N, C, H, W) and the image (B,) of each row to tokens (B, T, D)."""
        tokens = self.x_embedder(latents.to(self.pos_embed.dtype)) + self.pos_embed  # (N, T, D)
        return tokens.index_select(0, rows)  # (B, T, D)

    def reference(self, latents: Tensor, rows: Tensor) -> Tensor:
        """The same tokens, computed with the convolution of the PyTorch model."""
        layer, p = self.x_embedder.proj, self.spec.patch
        kernel = layer.weight.reshape(-1, self.spec.channels, p, p)
        tokens = (
            nn.functional.conv2d(latents, kernel, layer.bias, stride=p).flatten(2).transpose(1, 2)
        )
        return (tokens + self.pos_embed).index_select(0, rows)


def add_gated(x: Tensor, gate: Tensor, feature: Tensor) -> Tensor:
    """``x + gate * feature``, computed in float32 and returned in the dtype of ``x``.

    Args:
        x: (B, T, D).
        gate: (B, D).
        feature: (B, T, D).
    """
    return (x.float() + gate.float().unsqueeze(1) * feature.float()).to(x.dtype)


def scaled_queries(q: Tensor) -> Tensor:
    """Queries (..., head width) divided by the square root of the head width.

    The factor is applied in float32. For a head width of 72 it would be rounded to bf16 with an
    error of 0.15 %, by which all scores would be too small or too large.
    """
    return (q.float() * q.shape[-1] ** -0.5).to(q.dtype)


class AttnUnit(nn.Module):
    """The unit of an attention branch."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.attn = Attention(spec.hidden, spec.heads)

    def forward(
        self, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor
    ) -> tuple[Tensor, Tensor]:
        """``x`` (B, T, D) and modulation (B, D) to x_out (B, T, D) and feature (B*T, D)."""
        batch, tokens, hidden = x.shape
        heads = self.attn.heads
        qkv = self.attn.qkv(modulate(x, shift, scale).reshape(-1, hidden))  # (B*T, 3*D)
        q, k, v = (
            qkv.reshape(batch, tokens, 3, heads, hidden // heads).permute(2, 0, 3, 1, 4).unbind(0)
        )
        # (B, heads, T, T)
        scores = torch.matmul(scaled_queries(q), k.transpose(-1, -2))
        weights = torch.softmax(scores.float(), dim=-1).to(x.dtype)
        mixed = torch.matmul(weights, v).transpose(1, 2).reshape(-1, hidden)  # (B*T, D)
        feature = self.attn.proj(mixed)
        return add_gated(x, gate, feature.reshape(x.shape)), feature

    def reference(
        self, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The same tensors, computed with the branch of the PyTorch model."""
        feature = self.attn(modulate(x, shift, scale))
        return x + gate.unsqueeze(1) * feature, feature.reshape(-1, x.shape[-1])


class MlpUnit(nn.Module):
    """The unit of an MLP branch."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.mlp = Mlp(spec.hidden, spec.mlp_hidden)
        self.norm_eps = spec.mlp_norm_eps

    def forward(
        self, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor
    ) -> tuple[Tensor, Tensor]:
        """``x`` (B, T, D) and modulation (B, D) to x_out (B, T, D) and feature (B*T, D)."""
        modulated = modulate(x, shift, scale, self.norm_eps)
        feature = self.mlp(modulated.reshape(-1, x.shape[-1]))  # (B*T, D)
        return add_gated(x, gate, feature.reshape(x.shape)), feature

    def reference(
        self, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The same tensors, computed with the branch of the PyTorch model."""
        feature = self.mlp(modulate(x, shift, scale, self.norm_eps))
        return x + gate.unsqueeze(1) * feature, feature.reshape(-1, x.shape[-1])


class FinalUnit(nn.Module):
    """Tokens to the model output."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.linear = nn.Linear(spec.hidden, spec.patch**2 * spec.output_channels)

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """Tokens (B, T, D) and modulation (B, D) to the output (B, C_out, H, W) float32."""
        modulated = modulate(x, shift, scale)
        patches = self.linear(modulated.reshape(-1, x.shape[-1]))  # (B*T, p*p*C_out)
        return unpatchify(patches, self.spec).float()


def graph_kinds(spec: ModelSpec, precision: Precision) -> tuple[GraphKind, ...]:
    """The graphs of a DiT, in the order in which they are written."""
    examples = Examples(spec, DTYPES[precision])
    conditioning: nn.Module = examples.module(
        BlockConditioningUnit if spec.block_embedders else ConditioningUnit
    )
    attn, mlp = examples.module(AttnUnit), examples.module(MlpUnit)
    labels = Input("labels", torch.tensor([0, spec.choices]), {0: "labels"})
    branch = (examples.tokens(), *examples.modulation("shift", "scale", "gate"))
    return (
        GraphKind(
            "conditioning",
            conditioning,
            (STEPS, labels),
            ("table",),
            {"conditioning": _conditioning(conditioning, spec)},
            weights_are_inputs=True,
        ),
        embed_kind(spec, examples),
        GraphKind(
            "attn", attn, branch, ("x_out", "feature"), block_copies(attn, spec.depth, "attn")
        ),
        GraphKind("mlp", mlp, branch, ("x_out", "feature"), block_copies(mlp, spec.depth, "mlp")),
        final_kind(spec, examples),
    )


def embed_kind(spec: ModelSpec, examples: Examples) -> GraphKind:
    """The graph of latents to tokens, for one size of samples or for any."""
    make = any_size.EmbedUnit if spec.any_size else EmbedUnit
    embed: nn.Module = examples.module(make)
    inputs = [any_size.latents_example(spec, examples) if spec.any_size else examples.latents()]
    inputs.append(ROWS)
    if spec.positions is not None and spec.positions.kind == "sine":
        inputs.append(any_size.table_example(spec, examples))
    return GraphKind("embed", embed, tuple(inputs), ("x",), {"embed": same_names(embed)})


def final_kind(spec: ModelSpec, examples: Examples) -> GraphKind:
    """The graph of tokens to the model output, for one size of samples or for any."""
    make = any_size.FinalUnit if spec.any_size else FinalUnit
    final: nn.Module = examples.module(make)
    x = any_size.grid_example(spec, examples) if spec.any_size else examples.tokens()
    return GraphKind(
        "final",
        final,
        (x, *examples.modulation("shift", "scale")),
        ("prediction",),
        {"final": same_names(final, "final_layer.")},
    )


def check_tensors(tensors: Mapping[str, Tensor], spec: ModelSpec) -> None:
    """Check that names and shapes of tensors are those of the architecture.

    Raises:
        ModelError: tensors are missing, unexpected or of another shape; the message lists up to ten
            of each.
    """
    check_shapes(
        tensors,
        shapes_of(lambda: DiT(spec)),
        f"a DiT of depth {spec.depth} and width {spec.hidden}",
    )


def positions(spec: ModelSpec) -> Positions:
    """The positions of the public checkpoints, and of models that diffusers made."""
    return Positions("sine", base=spec.axes[0])


def _conditioning(module: nn.Module, spec: ModelSpec) -> dict[str, tuple[Slab, ...]]:
    """Bind the embedders, and all adaLN layers as one matrix if they share one condition."""
    binding = same_names(module)
    if spec.block_embedders:
        return binding
    blocks = [f"blocks.{block}.adaLN_modulation.1" for block in range(spec.depth)]
    modulating = (SHIFT_ATTN, SCALE_ATTN, SHIFT_MLP, SCALE_MLP)
    parts = spec.modulation.in_order(
        gates=[(layer, gate) for layer in blocks for gate in (GATE_ATTN, GATE_MLP)],
        final=[("final_layer.adaLN_modulation.1", chunk) for chunk in (0, 1)],
        units=[(layer, chunk) for layer in blocks for chunk in modulating],
    )
    for kind in ("weight", "bias"):
        binding[f"modulation.{kind}"] = tuple(
            Slab(f"{layer}.{kind}", chunk * spec.hidden, (chunk + 1) * spec.hidden)
            for layer, chunk in chain.from_iterable(parts)
        )
    return binding


DIT = Architecture(
    "dit",
    frozenset(
        {
            "x_embedder.proj.weight",
            "final_layer.linear.weight",
            "y_embedder.embedding_table.weight",
        }
    ),
    spec_from_tensors,
    check_tensors,
    graph_kinds,
    positions,
    DiffusersFolder(
        ("DiTPipeline",),
        "DiTTransformer2DModel",
        spec_from_config,
        state_from_diffusers,
        "ada_norm_zero",
        layers_in_diffusers,
    ),
)
