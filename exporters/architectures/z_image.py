"""Z-Image as exported graphs: blocks that see the image and its caption as one sequence.

The modulation depends on the time only and has scales and gates; the caption has a few blocks of
its own, without modulation, which are computed once per request. The image has a few blocks before
it meets the caption.

Source: Z-Image Team, "Z-Image: An Efficient Image Generation Foundation Model with Single-Stream
Diffusion Transformer", 2025; names and arithmetic are those of diffusers'
``ZImageTransformer2DModel``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Annotated, Any

from msgspec import Meta, Struct
from torch import Tensor

from goc_deploy.blocks import (
    IMAGE_FEATURE,
    MAX_BLOCKS,
    STREAMS,
    TEXT_FEATURE,
    Unit,
    UnitPlace,
)
from goc_deploy.errors import ModelError
from goc_deploy.exporters.architectures.contract import Architecture, DiffusersFolder
from goc_deploy.exporters.architectures.joint_family import JointFamily
from goc_deploy.exporters.architectures.joint_kinds import Layers, MakeModule, Row
from goc_deploy.exporters.architectures.reading import (
    PATCH,
    VALUES_OF_PATCH,
    check_heads,
    count_blocks,
    image_spec,
    reading_sizes,
)
from goc_deploy.exporters.architectures.z_image_units import (
    CONDITION,
    MULTIPLE,
    AttnUnit,
    CaptionsUnit,
    ConditioningUnit,
    EmbedUnit,
    FinalUnit,
    MlpUnit,
)
from goc_deploy.exporters.folders import MAX_WIDTH, Setting, Settings
from goc_deploy.spec import ModelSpec, Positions

TOKENS, GRID = 512, (64, 64)  # of a caption, and of an image of 1024x1024 pixels
VAE_CHANNELS = 16  # of the public model
KEY = f"{PATCH}-1"  # of the embedding and the final layer, by the sizes of their patches
BRANCHES = ("attn", "mlp")
ALONE = tuple(Unit(branch, ("scale",)) for branch in BRANCHES)
BOTH = tuple(
    Unit(branch, ("scale",), (IMAGE_FEATURE, TEXT_FEATURE), STREAMS) for branch in BRANCHES
)
LAST = (Unit("attn", ("scale",), (IMAGE_FEATURE,), STREAMS), ALONE[1])
CHUNKS = {"attn": 0, "mlp": 2}  # of a block's modulation: the scale of a branch, then its gate
LAYERS: Mapping[str, Layers] = {
    "attn": {
        "qkv": tuple(f"attention.to_{part}" for part in "qkv"),
        "proj": ("attention.to_out.0",),
        **{f"norm{i}": (f"attention_norm{i}.weight",) for i in (1, 2)},
        **{f"norm_{part}": (f"attention.norm_{part}.weight",) for part in "qk"},
    },
    "mlp": {
        **{f"w{i}": (f"feed_forward.w{i}",) for i in (1, 2, 3)},
        **{f"norm{i}": (f"ffn_norm{i}.weight",) for i in (1, 2)},
    },
}


class ZImageConfig(Struct, frozen=True, kw_only=True):
    """The settings of a ZImageTransformer2DModel that are read, with the defaults of diffusers."""

    in_channels: Setting = 16
    dim: Setting = 3840
    n_layers: Setting = 30
    n_refiner_layers: Setting = 2
    n_heads: Setting = 30
    cap_feat_dim: Setting = 2560
    rope_theta: Annotated[float, Meta(gt=1)] = 256.0
    axes_dims: Annotated[tuple[Setting, ...], Meta(min_length=3, max_length=3)] = (32, 48, 48)
    n_kv_heads: Setting = 30


SETTINGS = Settings(
    ZImageConfig,
    required={
        "_class_name": ("ZImageTransformer2DModel",),
        "all_patch_size": ([PATCH],),
        "all_f_patch_size": ([1],),
        "norm_eps": (1e-5,),
        "qk_norm": (True,),
        "siglip_feat_dim": (None,),  # Omni reads pictures too
        "t_scale": (1000.0,),
    },
    without_effect=("_diffusers_version", "_name_or_path", "axes_lens"),
)


def spec_from_config(config: Mapping[str, Any], where: str) -> ModelSpec:
    """The sizes of the model that a ``config.json`` describes.

    Raises:
        ModelError: a setting is unknown, not supported or out of range; the message names it.
    """
    return spec_of(SETTINGS.read(config, where), where)


def spec_from_tensors(tensors: Mapping[str, Tensor], heads: int | None) -> ModelSpec:
    """Infer the sizes of a model from its tensors.

    Raises:
        ModelError: the sizes cannot be read, or another number of heads was given.
    """
    with reading_sizes("Z-Image"):
        dim, of_patch = tensors[f"all_x_embedder.{KEY}.weight"].shape
        (head,) = tensors["layers.0.attention.norm_q.weight"].shape
        text = tensors["cap_embedder.1.weight"].shape[1]
    known = head > 0 and head % 16 == 0
    check_heads(dim, head, heads, known=known, supported="a multiple of 16")
    side = 3 * head // 8  # values of a head for rows, and for columns, as in the public model
    config = ZImageConfig(
        in_channels=of_patch // VALUES_OF_PATCH,
        dim=dim,
        n_layers=count_blocks(tensors, "layers"),
        n_refiner_layers=count_blocks(tensors, "noise_refiner"),
        n_heads=dim // head,
        n_kv_heads=dim // head,
        cap_feat_dim=text,
        axes_dims=(head - 2 * side, side, side),
    )
    return spec_of(config, "the checkpoint")


def spec_of(read: ZImageConfig, where: str) -> ModelSpec:
    """The model of some settings, for images of 1024x1024 pixels.

    Raises:
        ModelError: the settings do not fit together; the message names them.
    """
    heads, widths, depth = read.n_heads, read.axes_dims, read.n_refiner_layers + read.n_layers
    if heads * sum(widths) != read.dim or any(width % 2 for width in widths):
        raise ModelError(
            f"{where}: axes_dims is {list(widths)}; they must be even, and their sum times n_heads "
            f"({heads}) must be dim, {read.dim}"
        )
    if read.n_kv_heads != heads or not CONDITION <= read.dim <= MAX_WIDTH or depth > MAX_BLOCKS:
        raise ModelError(
            f"{where}: n_kv_heads is {read.n_kv_heads}, expected n_heads, {heads}; dim is "
            f"{read.dim}, expected {CONDITION} to {MAX_WIDTH}; there are {depth} blocks, at most "
            f"{MAX_BLOCKS} are supported"
        )
    spec = image_spec(
        "z-image",
        [*[ALONE] * read.n_refiner_layers, *[BOTH] * (read.n_layers - 1), LAST],
        heads=heads,
        head=sum(widths),
        mlp_hidden=int(read.dim / 3 * 8),
        channels=read.in_channels,
        grid=GRID,
    )
    return replace(
        spec,
        caption_channels=read.cap_feat_dim,
        caption_tokens=TOKENS,
        positions=Positions("rotary", widths=widths, theta=read.rope_theta),
        vae_scale=spec.vae_scale if read.in_channels == VAE_CHANNELS else 1,
        token_multiple=MULTIPLE,
    )


@lru_cache(maxsize=64)
def block_names(spec: ModelSpec) -> tuple[str, ...]:
    """The name of each block, in the order of execution."""
    alone, joint = range(spec.blocks[0].count), range(spec.depth - spec.blocks[0].count)
    return (*(f"noise_refiner.{i}" for i in alone), *(f"layers.{i}" for i in joint))


def _layers(spec: ModelSpec) -> dict[str, Layers]:
    refined = {
        f"{branch}.{i}.{layer}": tuple(f"context_refiner.{i}.{part}" for part in parts)
        for i in range(spec.blocks[0].count)
        for branch, layers in LAYERS.items()
        for layer, parts in layers.items()
    }
    return {
        "conditioning": {
            "fc1": ("t_embedder.mlp.0",),
            "fc2": ("t_embedder.mlp.2",),
            "final": (f"all_final_layer.{KEY}.adaLN_modulation.1",),
        },
        "captions": {
            "norm": ("cap_embedder.0.weight",),
            "pad_token": ("cap_pad_token",),
            "embed": ("cap_embedder.1",),
            **refined,
        },
        "embed": {"embed": (f"all_x_embedder.{KEY}",)},
        **{
            branch: {f"{branch}.{layer}": parts for layer, parts in layers.items()}
            for branch, layers in LAYERS.items()
        },
        "final": {"linear": (f"all_final_layer.{KEY}.linear",)},
    }


def _row(spec: ModelSpec, place: UnitPlace, name: str) -> Row:
    chunk = CHUNKS[place.branch] + (name != "scale")
    return f"{block_names(spec)[place.block]}.adaLN_modulation.0", chunk


class ZImageFamily(JointFamily):
    """The family, which has modules of its own."""

    def modules(self, spec: ModelSpec, places: Sequence[int]) -> Mapping[str, MakeModule]:
        """See `JointFamily`."""
        return {
            "conditioning": partial(ConditioningUnit, spec, places),
            "captions": partial(CaptionsUnit, spec, spec.blocks[0].count),
            "embed": partial(EmbedUnit, spec),
            "final": partial(FinalUnit, spec),
        }


FAMILY = ZImageFamily(
    "Z-Image",
    _layers,
    _row,
    {"attn": AttnUnit, "mlp": MlpUnit},
    block_names,
    final_rows=(),
    masked=("attn", "captions"),
    fp16=True,
    unread=lambda spec: {"x_pad_token": (1, spec.hidden)},
)
Z_IMAGE = Architecture(
    "z-image",
    frozenset({"cap_pad_token", "x_pad_token", f"all_x_embedder.{KEY}.weight"}),
    spec_from_tensors,
    FAMILY.check_tensors,
    FAMILY.graph_kinds,
    folder=DiffusersFolder(
        ("ZImagePipeline",), "ZImageTransformer2DModel", spec_from_config, even_sigmas=True
    ),
)
