"""FLUX.1 dev and schnell: double blocks with two streams, then single blocks that join them.

All modulation depends on the timestep, the pooled caption and, in FLUX.1-dev, the guidance scale.
The gates of a single block are the same for both of its features. Positions of the text are all 0,
so only queries and keys of the image are turned. Captions are not masked: the padding of a short
one is read as tokens.

Source: the open models of Black Forest Labs, 2024; names and arithmetic are those of diffusers'
``FluxTransformer2DModel``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from goc_deploy.blocks import STREAMS, Unit
from goc_deploy.errors import ModelError
from goc_deploy.exporters.architectures.contract import Architecture, DiffusersFolder, OtherLayout
from goc_deploy.exporters.architectures.flux_authors import LAYOUT
from goc_deploy.exporters.architectures.flux_units import SingleUnit
from goc_deploy.exporters.architectures.joint_family import (
    ATTENTION,
    BLOCK,
    BOTH,
    UNITS,
    JointFamily,
    channels_first,
    mlp_layers,
    rows_in_blocks,
    rows_of_layers,
)
from goc_deploy.exporters.architectures.joint_kinds import Layers, Parts
from goc_deploy.exporters.architectures.reading import (
    VALUES_OF_PATCH,
    JointConfig,
    check_heads,
    count_blocks,
    image_spec,
    reading_sizes,
)
from goc_deploy.exporters.folders import Setting, Settings
from goc_deploy.exporters.units import Slab
from goc_deploy.spec import ModelSpec, Positions

GRID = (64, 64)  # tokens of an image of 1024 x 1024 pixels
MLP_RATIO = 4
TOKENS, TOKENS_WITHOUT_GUIDANCE = 512, 256  # of a caption: of FLUX.1-dev, and of FLUX.1-schnell
AXES = (16, 56, 56)  # values of a head that an image's index, row and column turn
SINGLE = (Unit("single", features=BOTH, reads=STREAMS),)
LAST = (Unit("single", reads=STREAMS),)  # nothing reads the text after it
SINGLE_CHUNKS = {"shift": 0, "scale": 1, "gate": 2, "gate_text": 2}
ROWS = {
    **rows_of_layers("norm1.linear", "norm1_context.linear"),
    "single": {name: ("norm.linear", chunk) for name, chunk in SINGLE_CHUNKS.items()},
}


class SinglesConfig(JointConfig, frozen=True, kw_only=True):
    """The settings that FLUX.1 and FLUX.2 have in common.

    Attributes:
        num_single_layers: single blocks, after the others.
        guidance_embeds: whether the modulation depends on the guidance scale.
    """

    num_single_layers: Setting
    guidance_embeds: bool


class FluxConfig(SinglesConfig, frozen=True, kw_only=True):
    """The settings of a FluxTransformer2DModel that are read, with the defaults of diffusers."""

    in_channels: Setting = 64
    num_layers: Setting = 19
    num_single_layers: Setting = 38
    attention_head_dim: Setting = 128
    num_attention_heads: Setting = 24
    joint_attention_dim: Setting = 4096
    pooled_projection_dim: Setting = 768
    guidance_embeds: bool = False
    axes_dims_rope: tuple[Setting, Setting, Setting] = AXES


SETTINGS = Settings(
    FluxConfig, required={"_class_name": ("FluxTransformer2DModel",), "patch_size": (1,)}
)


def spec_from_config(config: Mapping[str, Any], where: str) -> ModelSpec:
    """The sizes of the model that a ``config.json`` describes.

    Raises:
        ModelError: a setting is unknown, not supported or out of range; the message names it.
    """
    settings = SETTINGS.read(config, where)
    if settings.out_channels not in (None, settings.in_channels):
        raise ModelError(
            f"{where}: in_channels is {settings.in_channels} and out_channels "
            f"{settings.out_channels}; models that start from a picture are not supported"
        )
    settings.check(where)
    return spec_of(settings)


def spec_from_tensors(tensors: Mapping[str, Tensor], heads: int | None) -> ModelSpec:
    """Infer the sizes of a model from its tensors, in the layout of diffusers.

    Raises:
        ModelError: the sizes cannot be read, or are not those of a text-to-image model.
    """
    with reading_sizes("FLUX.1"):
        hidden, values = tensors["x_embedder.weight"].shape
        predicted = tensors["proj_out.weight"].shape[0]
        head = tensors["single_transformer_blocks.0.attn.norm_q.weight"].shape[0]
        text = tensors["context_embedder.weight"].shape[1]
        pooled = tensors["time_text_embed.text_embedder.linear_1.weight"].shape[1]
    check_heads(hidden, head, heads, known=head == sum(AXES), supported=str(sum(AXES)))
    if values != predicted or values % VALUES_OF_PATCH:
        raise ModelError(
            f"the model reads {values} values per token and predicts {predicted}; models that "
            "start from a picture are not supported"
        )
    return spec_of(
        FluxConfig(
            in_channels=values,
            num_layers=count_blocks(tensors),
            num_single_layers=count_blocks(tensors, "single_transformer_blocks"),
            num_attention_heads=hidden // head,
            joint_attention_dim=text,
            pooled_projection_dim=pooled,
            guidance_embeds="time_text_embed.guidance_embedder.linear_1.weight" in tensors,
        )
    )


def sizes_of(architecture: str, settings: SinglesConfig, mlp_ratio: int) -> ModelSpec:
    """What the settings of FLUX.1 and FLUX.2 say alike, for images of 1024 x 1024 pixels."""
    heads, head = settings.num_attention_heads, settings.attention_head_dim
    spec = image_spec(
        architecture,
        [*[BLOCK] * settings.num_layers, *[SINGLE] * (settings.num_single_layers - 1), LAST],
        heads=heads,
        head=head,
        mlp_hidden=mlp_ratio * heads * head,
        channels=settings.in_channels // VALUES_OF_PATCH,
        grid=GRID,
    )
    return replace(
        spec,
        caption_channels=settings.joint_attention_dim,
        caption_tokens=TOKENS,
        embedded_guidance=settings.guidance_embeds,
    )


def spec_of(settings: FluxConfig) -> ModelSpec:
    """The model of these sizes, for images of 1024 x 1024 pixels."""
    return replace(
        sizes_of("flux", settings, MLP_RATIO),
        caption_tokens=TOKENS if settings.guidance_embeds else TOKENS_WITHOUT_GUIDANCE,
        pooled_channels=settings.pooled_projection_dim,
        distilled=True,
        positions=Positions("rotary", widths=settings.axes_dims_rope),
    )


def layers_with(
    spec: ModelSpec, mlp: Layers, *, kv: Parts, q_mlp: Parts, proj: Parts
) -> dict[str, Layers]:
    """The layers of a FLUX.1 or FLUX.2.

    Args:
        spec: sizes of the model.
        mlp: the layers of the MLPs of double blocks.
        kv: keys and values of single blocks.
        q_mlp: their queries and the first layer of their MLPs.
        proj: the layer after both.
    """
    norms = {f"norm_{part}": (f"attn.norm_{part}.weight",) for part in "qk"}
    return {
        "captions": {"linear": ("context_embedder",)},
        "embed": {"x_embedder.proj": ("x_embedder",)},
        "attn": ATTENTION,
        "mlp": mlp,
        "single": {"kv": kv, "q_mlp": q_mlp, "proj": proj, **norms},
        "final": {"linear": channels_first("proj_out", spec)},
    }


def _layers(spec: ModelSpec) -> dict[str, Layers]:
    return layers_with(
        spec,
        mlp_layers("ff", "ff_context"),
        kv=("attn.to_k", "attn.to_v"),
        q_mlp=(Slab("attn.to_q", 0, spec.hidden), "proj_mlp"),
        proj=("proj_out",),
    )


FAMILY = JointFamily("FLUX.1", _layers, rows_in_blocks(ROWS), {**UNITS, "single": SingleUnit})
FLUX = Architecture(
    "flux",
    frozenset(
        {
            "transformer_blocks.0.attn.add_q_proj.weight",
            "single_transformer_blocks.0.proj_mlp.weight",
            "time_text_embed.text_embedder.linear_1.weight",
        }
    ),
    spec_from_tensors,
    FAMILY.check_tensors,
    FAMILY.graph_kinds,
    folder=DiffusersFolder(
        ("FluxPipeline",), "FluxTransformer2DModel", spec_from_config, even_sigmas=True
    ),
    other_layout=OtherLayout(frozenset({LAYOUT.joined, "img_in.weight"}), LAYOUT.state),
)
