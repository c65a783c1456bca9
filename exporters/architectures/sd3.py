"""Stable Diffusion 3 and 3.5 as exported graphs: joint attention of image and text (MMDiT).

The attention branch of a block reads both streams and adds a feature to each; so does the MLP
branch, with weights of its own for each. Dual blocks (Stable Diffusion 3.5 Medium) have a second
attention, of the image alone, which reads the tokens before the block and adds a feature of its
own. The last block leaves the text as it is, so its text only gives keys and values. All modulation
depends on the timestep and the pooled embedding of the caption.

Source: Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis",
ICML 2024, section 4; names and arithmetic are those of diffusers' ``SD3Transformer2DModel``.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from goc_deploy.blocks import Unit, UnitPlace
from goc_deploy.exporters.architectures.contract import Architecture, DiffusersFolder, OtherLayout
from goc_deploy.exporters.architectures.joint import AttnUnit
from goc_deploy.exporters.architectures.joint_family import (
    ATTENTION,
    UNITS,
    JointFamily,
    mlp_layers,
    rows_of_layers,
)
from goc_deploy.exporters.architectures.joint_kinds import Layers, Row
from goc_deploy.exporters.architectures.sd3_layout import LAYOUT, TABLE, state_from_authors
from goc_deploy.exporters.architectures.sd3_spec import (
    NAME,
    spec_from_config,
    spec_from_tensors,
    state_from_diffusers,
)
from goc_deploy.spec import ModelSpec

IMAGE_ROWS, TEXT_ROWS = "norm1.linear", "norm1_context.linear"
ROWS = rows_of_layers(IMAGE_ROWS, TEXT_ROWS)
SECOND_ROWS = {"shift_2": 6, "scale_2": 7, "gate_2": 8}
LAST_ROWS = {"scale_text": 0, "shift_text": 1}
SECOND: Layers = {
    "second.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "second.norm_q": ("attn2.norm_q.weight",),
    "second.norm_k": ("attn2.norm_k.weight",),
    "proj_2": ("attn2.to_out.0",),
}


def attention(spec: ModelSpec, unit: Unit, names: Sequence[str]) -> nn.Module:
    """The module of an attention unit; only some models have norms."""
    return AttnUnit(spec, unit, names, norms=spec.qk_norm)


def _layers(_spec: ModelSpec) -> dict[str, Layers]:
    return {
        "captions": {"linear": ("context_embedder",)},
        "embed": {"x_embedder.proj": ("pos_embed.proj",)},
        "attn": {**ATTENTION, **SECOND},
        "mlp": mlp_layers("ff", "ff_context"),
        "final": {"linear": ("proj_out",)},
    }


def _row(spec: ModelSpec, place: UnitPlace, name: str) -> Row:
    block = f"transformer_blocks.{place.block}"
    if name in SECOND_ROWS:
        return f"{block}.{IMAGE_ROWS}", SECOND_ROWS[name]
    if name in LAST_ROWS and place.block == spec.depth - 1:
        return f"{block}.{TEXT_ROWS}", LAST_ROWS[name]
    layer, chunk = ROWS[place.branch][name]
    return f"{block}.{layer}", chunk


def _unread(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """The position table, the embedding as a convolution, and the last queries of the text."""
    assert spec.positions is not None
    attn, width = f"transformer_blocks.{spec.depth - 1}.attn", spec.hidden
    norm = {f"{attn}.norm_added_q.weight": (width // spec.heads,)} if spec.qk_norm else {}
    return {
        TABLE: (1, spec.positions.table**2, width),
        "pos_embed.proj.weight": (width, spec.channels, spec.patch, spec.patch),
        f"{attn}.add_q_proj.weight": (width, width),
        f"{attn}.add_q_proj.bias": (width,),
        **norm,
    }


FAMILY = JointFamily(
    "Stable Diffusion 3", _layers, _row, {**UNITS, "attn": attention}, fp16=True, unread=_unread
)
SD3 = Architecture(
    NAME,
    frozenset(
        {
            "pos_embed.proj.weight",
            "context_embedder.weight",
            "transformer_blocks.0.norm1_context.linear.weight",
        }
    ),
    spec_from_tensors,
    FAMILY.check_tensors,
    FAMILY.graph_kinds,
    folder=DiffusersFolder(
        ("StableDiffusion3Pipeline",),
        "SD3Transformer2DModel",
        spec_from_config,
        state_from_diffusers,
    ),
    other_layout=OtherLayout(
        frozenset({"pos_embed", LAYOUT.joined}),
        state_from_authors,
    ),
)
