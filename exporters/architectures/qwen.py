"""Qwen-Image: blocks that change the tokens of the image and of the caption.

The modulation does not depend on the caption, so its table has one row. Padding of a caption is
masked. The last block changes only the image: its queries of the text, and what follows them, are
left out.

Source: Qwen Team, "Qwen-Image Technical Report", 2025, section 2; names and arithmetic are those of
diffusers' ``QwenImageTransformer2DModel``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

from msgspec import Meta
from torch import Tensor

from goc_deploy.blocks import IMAGE_FEATURE, STREAMS, Blocks, Unit
from goc_deploy.errors import ModelError
from goc_deploy.exporters.architectures.contract import Architecture, DiffusersFolder
from goc_deploy.exporters.architectures.joint_family import (
    ATTENTION,
    BLOCK,
    READ,
    UNITS,
    JointFamily,
    channels_first,
    mlp_layers,
    rows_in_blocks,
    rows_of_layers,
)
from goc_deploy.exporters.architectures.joint_kinds import Layers
from goc_deploy.exporters.architectures.reading import (
    VALUES_OF_PATCH,
    JointConfig,
    check_heads,
    count_blocks,
    image_spec,
    reading_sizes,
)
from goc_deploy.exporters.folders import Setting, Settings
from goc_deploy.spec import ModelSpec, Positions

MLP_RATIO = 4
TOKENS = 512  # of a caption, in diffusers' pipeline; a longer one is cut
GRID = (83, 83)  # tokens of an image of 1328x1328 pixels
VAE_CHANNELS = 16  # of the public models
# Nothing reads the text after the last attention.
LAST = (Unit("attn", READ, (IMAGE_FEATURE,), STREAMS), Unit("mlp"))


class QwenConfig(JointConfig, frozen=True, kw_only=True):
    """The settings of a QwenImageTransformer2DModel that are read, with the defaults of diffusers.

    The axes are frames, rows and columns.
    """

    num_attention_heads: Setting = 24
    attention_head_dim: Setting = 128
    in_channels: Setting = 64
    out_channels: int | None = 16
    joint_attention_dim: Setting = 3584
    num_layers: Setting = 60
    axes_dims_rope: Annotated[tuple[Setting, ...], Meta(min_length=3, max_length=3)] = (16, 56, 56)


SETTINGS = Settings(
    QwenConfig,
    required={
        "_class_name": ("QwenImageTransformer2DModel",),
        "patch_size": (2,),
        "guidance_embeds": (False,),
        "zero_cond_t": (False,),  # Edit-2511 has another time for the tokens of its references
        "use_additional_t_cond": (False,),  # as Layered
        "use_layer3d_rope": (False,),
    },
)


def spec_from_config(config: Mapping[str, Any], where: str) -> ModelSpec:
    """The sizes of the model that a ``config.json`` describes.

    Raises:
        ModelError: a setting is unknown, not supported or out of range; the message names it.
    """
    settings = SETTINGS.read(config, where)
    settings.check(where)
    channels = settings.in_channels // VALUES_OF_PATCH
    if (settings.out_channels or settings.in_channels) != channels:
        raise ModelError(
            f"{where}: in_channels is {settings.in_channels} and out_channels "
            f"{settings.out_channels}; only {VALUES_OF_PATCH} times as many channels in as out, "
            "the values of a patch, are supported"
        )
    return spec_of(
        settings.num_layers,
        settings.num_attention_heads,
        settings.axes_dims_rope,
        channels=channels,
        text=settings.joint_attention_dim,
    )


def spec_from_tensors(tensors: Mapping[str, Tensor], heads: int | None) -> ModelSpec:
    """Infer the sizes of a model from its tensors.

    Raises:
        ModelError: the sizes cannot be read, or another number of heads was given.
    """
    with reading_sizes("Qwen-Image"):
        hidden, of_patch = tensors["img_in.weight"].shape
        text = tensors["txt_in.weight"].shape[1]
        (head,) = tensors["transformer_blocks.0.attn.norm_q.weight"].shape
    known = head > 0 and head % 32 == 0
    check_heads(hidden, head, heads, known=known, supported="a multiple of 32")
    side = 7 * head // 16  # values of a head for rows, and for columns; the rest is for frames
    return spec_of(
        count_blocks(tensors),
        hidden // head,
        (head - 2 * side, side, side),
        channels=of_patch // VALUES_OF_PATCH,
        text=text,
    )


def spec_of(
    depth: int, heads: int, widths: tuple[int, ...], *, channels: int, text: int
) -> ModelSpec:
    """The model of these sizes, for images of 1328x1328 pixels.

    Args:
        depth: number of blocks.
        heads: attention heads.
        widths: values of a head that frames, rows and columns turn.
        channels: channels of the latents.
        text: width of a caption's embeddings.
    """
    spec = image_spec(
        "qwen-image",
        [*[BLOCK] * (depth - 1), LAST],
        heads=heads,
        head=sum(widths),
        mlp_hidden=MLP_RATIO * heads * sum(widths),
        channels=channels,
        grid=GRID,
    )
    return replace(
        spec,
        guidance_norm="token",
        caption_channels=text,
        caption_tokens=TOKENS,
        positions=Positions("rotary", widths=widths, centered=True, turns_text=True),
        vae_scale=spec.vae_scale if channels == VAE_CHANNELS else 1,
    )


def _layers(spec: ModelSpec) -> dict[str, Layers]:
    return {
        "captions": {"linear": ("txt_in",), "norm": ("txt_norm.weight",)},
        "embed": {"x_embedder.proj": ("img_in",)},
        "attn": ATTENTION,
        "mlp": mlp_layers("img_mlp", "txt_mlp"),
        "final": {"linear": channels_first("proj_out", spec)},
    }


def _stored(spec: ModelSpec) -> ModelSpec:
    """The last block has tensors for the text too."""
    return replace(spec, blocks=(Blocks(spec.depth, BLOCK),))


FAMILY = JointFamily(
    "Qwen-Image",
    _layers,
    rows_in_blocks(rows_of_layers("img_mod.1", "txt_mod.1")),
    UNITS,
    masked=("attn",),
    stored=_stored,
)
QWEN_IMAGE = Architecture(
    "qwen-image",
    frozenset({"img_in.weight", "txt_norm.weight", "transformer_blocks.0.txt_mod.1.weight"}),
    spec_from_tensors,
    FAMILY.check_tensors,
    FAMILY.graph_kinds,
    folder=DiffusersFolder(
        ("QwenImagePipeline",), "QwenImageTransformer2DModel", spec_from_config, even_sigmas=True
    ),
    sensitive=("first:2", "last:2"),  # as in the presets of NVIDIA's Model Optimizer
)
