"""The sizes of a Stable Diffusion 3, from the configuration of diffusers or from its tensors."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta, Struct
from torch import Tensor

from goc_deploy.blocks import IMAGE_FEATURE, MAX_BLOCKS, STREAMS, TEXT_FEATURE, Feature, Unit
from goc_deploy.errors import ModelError
from goc_deploy.exporters.architectures.reading import count_blocks, image_spec, reading_sizes
from goc_deploy.exporters.architectures.sd3_layout import TABLE, positions_from_table
from goc_deploy.exporters.folders import MAX_WIDTH, Setting, Settings
from goc_deploy.modulation import SHIFT_AND_SCALE
from goc_deploy.spec import ModelSpec, Positions

NAME = "sd3"
HEAD = 64  # width of a head in every public model
TOKENS = 77 + 256  # those of the CLIP encoders, and those of the T5 behind them
SIDE = 128  # of the usual latents, 1024 pixels
MAX_TABLE = 1024  # tokens per side of a position table
_SECOND = re.compile(r"transformer_blocks\.(\d+)\.attn2\.to_q\.weight")
_TEXT_ROWS = ("shift_text", "scale_text")
_SECOND_ROWS = ("shift_2", "scale_2")


class SD3Config(Struct, frozen=True, kw_only=True):
    """The settings of an SD3Transformer2DModel that are read, with the defaults of diffusers."""

    sample_size: Setting = 128
    patch_size: Setting = 2
    in_channels: Setting = 16
    out_channels: int | None = 16
    num_layers: Setting = 18
    attention_head_dim: Setting = 64
    num_attention_heads: Setting = 18
    joint_attention_dim: Setting = 4096
    caption_projection_dim: Setting = 1152
    pooled_projection_dim: Setting = 2048
    pos_embed_max_size: Setting = 96
    dual_attention_layers: Annotated[tuple[int, ...], Meta(max_length=MAX_BLOCKS)] = ()
    qk_norm: str | None = None


SETTINGS = Settings(
    SD3Config,
    required={"_class_name": ("SD3Transformer2DModel",), "qk_norm": (None, "rms_norm")},
)


def spec_from_config(config: Mapping[str, Any], where: str) -> ModelSpec:
    """The sizes of the model that a ``config.json`` describes.

    Raises:
        ModelError: a setting is unknown, not supported or out of range; the message names it.
    """
    settings = SETTINGS.read(config, where)
    hidden = settings.num_attention_heads * settings.attention_head_dim
    for name, value, expected, fits in _demands(settings, hidden):
        if not fits:
            raise ModelError(f"{where}: {name} is {value}, expected {expected}")
    return spec_of(
        settings.num_layers,
        settings.num_attention_heads,
        hidden,
        dual=settings.dual_attention_layers,
        qk_norm=settings.qk_norm is not None,
        table=settings.pos_embed_max_size,
        grid=settings.sample_size // settings.patch_size,
        patch=settings.patch_size,
        channels=settings.in_channels,
        text=settings.joint_attention_dim,
        pooled=settings.pooled_projection_dim,
    )


def _demands(settings: SD3Config, hidden: int) -> Iterator[tuple[str, Any, str, bool]]:
    """For each limited setting: its name, its value, what is expected, and whether it fits."""
    depth, channels = settings.num_layers, settings.in_channels
    side, patch, table = settings.sample_size, settings.patch_size, settings.pos_embed_max_size
    dual = settings.dual_attention_layers
    yield "num_layers", depth, f"at most {MAX_BLOCKS}", depth <= MAX_BLOCKS
    yield (
        "num_attention_heads * attention_head_dim",
        hidden,
        f"a width that 4 divides and that is at most {MAX_WIDTH}",
        hidden % 4 == 0 and hidden <= MAX_WIDTH,
    )
    projected = settings.caption_projection_dim
    yield "caption_projection_dim", projected, f"the width, {hidden}", projected == hidden
    out = settings.out_channels
    yield "out_channels", out, f"in_channels, {channels}", out in (None, channels)
    yield "pos_embed_max_size", table, f"2 to {MAX_TABLE}", 2 <= table <= MAX_TABLE
    yield (
        "sample_size",
        side,
        f"a multiple of patch_size, {patch}, and at most {patch * table} (pos_embed_max_size)",
        side % patch == 0 and side <= patch * table,
    )
    blocks = {number for number in dual if 0 <= number < depth}
    yield (
        "dual_attention_layers",
        list(dual),
        f"different numbers below {depth}",
        len(blocks) == len(dual),
    )


def spec_from_tensors(tensors: Mapping[str, Tensor], heads: int | None) -> ModelSpec:
    """Infer the sizes of a model from its tensors, in the layout of diffusers.

    Raises:
        ModelError: the sizes cannot be read, the number of heads does not divide the width, or the
            position table was learned.
    """
    with reading_sizes("Stable Diffusion 3"):
        hidden, channels, patch, _ = tensors["pos_embed.proj.weight"].shape
        text = tensors["context_embedder.weight"].shape[1]
        pooled = tensors["time_text_embed.text_embedder.linear_1.weight"].shape[1]
        norm = tensors.get("transformer_blocks.0.attn.norm_q.weight")
        positions = positions_from_table(tensors[TABLE])
    depth = count_blocks(tensors)
    heads = heads or hidden // (HEAD if norm is None else norm.numel())
    if not heads or hidden % heads or depth > MAX_BLOCKS:
        raise ModelError(
            f"{heads} heads do not divide the width {hidden}, or there are more than {MAX_BLOCKS} "
            f"blocks ({depth}); give another `num_heads`"
        )
    spec = spec_of(
        depth,
        heads,
        hidden,
        dual=[int(match[1]) for match in map(_SECOND.match, tensors) if match],
        qk_norm=norm is not None,
        table=positions.table,
        grid=min(SIDE // patch, positions.table),
        patch=patch,
        channels=channels,
        text=text,
        pooled=pooled,
    )
    return replace(spec, positions=positions)


def spec_of(
    depth: int,
    heads: int,
    hidden: int,
    *,
    dual: Collection[int],
    qk_norm: bool,
    table: int,
    grid: int = SIDE // 2,
    patch: int = 2,
    channels: int = 16,
    text: int = 4096,
    pooled: int = 2048,
) -> ModelSpec:
    """The model of these sizes, with the defaults of the public ones.

    Args:
        depth: number of blocks.
        heads: attention heads.
        hidden: width of the tokens.
        dual: the blocks that have a second attention.
        qk_norm: whether queries and keys are normalised.
        table: tokens per side of the position table.
        grid: tokens per side of the usual sample.
        patch: patch side in latent pixels.
        channels: channels of the latents.
        text: width of a caption's embeddings.
        pooled: width of a caption's pooled embedding.
    """
    blocks = [units_of_block(dual=i in dual, last=i == depth - 1) for i in range(depth)]
    spec = image_spec(
        NAME,
        blocks,
        heads=heads,
        head=hidden // heads,
        mlp_hidden=4 * hidden,
        channels=channels,
        grid=(grid, grid),
    )
    return replace(
        spec,
        patch=patch,
        caption_channels=text,
        caption_tokens=TOKENS,
        positions=Positions("sine", stretch=table / grid, table=table),
        pooled_channels=pooled,
        qk_norm=qk_norm,
    )


def units_of_block(*, dual: bool, last: bool) -> tuple[Unit, Unit]:
    """The units of a block.

    Args:
        dual: the attention branch has a second attention, of image tokens alone.
        last: nothing reads the text after this block, so it computes none.
    """
    second = (Feature("image", "_2"),) if dual else ()
    text = () if last else (TEXT_FEATURE,)
    rows = (*SHIFT_AND_SCALE, *(_SECOND_ROWS if dual else ()), *_TEXT_ROWS)
    attn = Unit("attn", rows, (IMAGE_FEATURE, *second, *text), STREAMS)
    if last:
        return attn, Unit("mlp")
    mlp_rows = (*SHIFT_AND_SCALE, *_TEXT_ROWS)
    return attn, Unit("mlp", mlp_rows, (IMAGE_FEATURE, TEXT_FEATURE), STREAMS)


def state_from_diffusers(
    tensors: Mapping[str, Tensor], spec: ModelSpec, where: Path
) -> tuple[ModelSpec, dict[str, Tensor]]:
    """The tensors of an SD3Transformer2DModel, whose names are kept; `check_tensors` checks them.

    Returns:
        The spec with the positions that the table of the folder shows, and the tensors.

    Raises:
        ModelError: the position table was learned.
    """
    assert spec.positions is not None
    table = tensors.get(TABLE)
    if table is not None and tuple(table.shape) == (1, spec.positions.table**2, spec.hidden):
        try:
            spec = replace(spec, positions=positions_from_table(table))
        except ModelError as cause:
            raise ModelError(f"{where}: {cause}") from cause
    return spec, dict(tensors)
