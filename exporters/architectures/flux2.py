"""FLUX.2 klein and dev: the blocks of FLUX.1 without biases, with SwiGLU and one shared modulation.

All double blocks share a modulation of the image and one of the text, and all single blocks another
one. They depend on the timestep and, in FLUX.2-dev, the guidance scale. Tokens of the text have
positions on an axis of their own. Captions are not masked.

Source: the open models of Black Forest Labs, 2025; names and arithmetic are those of diffusers'
``Flux2Transformer2DModel``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from goc_deploy.blocks import UnitPlace
from goc_deploy.errors import ModelError
from goc_deploy.exporters.architectures.contract import Architecture, DiffusersFolder
from goc_deploy.exporters.architectures.dit_model import TIMESTEP_FREQUENCIES
from goc_deploy.exporters.architectures.flux import (
    SINGLE_CHUNKS,
    SinglesConfig,
    layers_with,
    sizes_of,
)
from goc_deploy.exporters.architectures.flux_units import SingleUnit, SwiGluMlp
from goc_deploy.exporters.architectures.joint import AttnUnit, MlpUnit
from goc_deploy.exporters.architectures.joint_family import JointFamily, mlp_layers, rows_of_layers
from goc_deploy.exporters.architectures.joint_kinds import Layers, Row
from goc_deploy.exporters.architectures.reading import check_heads, count_blocks, reading_sizes
from goc_deploy.exporters.folders import Setting, Settings
from goc_deploy.exporters.units import Slab
from goc_deploy.spec import ModelSpec, Positions

MLP_RATIO = 3
AXES = (32, 32, 32, 32)  # values of a head that an image's index, row and column and the text turn
THETA = 2000
SINGLE_ROWS = "single_stream_modulation.linear"
ROWS = {
    **rows_of_layers(*(f"double_stream_modulation_{stream}.linear" for stream in ("img", "txt"))),
    "single": {name: (SINGLE_ROWS, chunk) for name, chunk in SINGLE_CHUNKS.items()},
}


class Flux2Config(SinglesConfig, frozen=True, kw_only=True):
    """The settings of a Flux2Transformer2DModel that are read, with the defaults of diffusers."""

    in_channels: Setting = 128
    num_layers: Setting = 8
    num_single_layers: Setting = 48
    attention_head_dim: Setting = 128
    num_attention_heads: Setting = 48
    joint_attention_dim: Setting = 15360
    guidance_embeds: bool = True
    axes_dims_rope: tuple[Setting, Setting, Setting, Setting] = AXES
    rope_theta: Setting = THETA


SETTINGS = Settings(
    Flux2Config,
    required={
        "_class_name": ("Flux2Transformer2DModel",),
        "patch_size": (1,),
        "timestep_guidance_channels": (TIMESTEP_FREQUENCIES,),
        "mlp_ratio": (3.0,),
        "eps": (1e-6,),
    },
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
            f"{settings.out_channels}, only equal numbers are supported"
        )
    settings.check(where)
    return spec_of(settings)


def spec_from_tensors(tensors: Mapping[str, Tensor], heads: int | None) -> ModelSpec:
    """Infer the sizes of a model from its tensors.

    Raises:
        ModelError: the sizes cannot be read, or the heads are not those of the public models.
    """
    with reading_sizes("FLUX.2"):
        hidden, values = tensors["x_embedder.weight"].shape
        head = tensors["single_transformer_blocks.0.attn.norm_q.weight"].shape[0]
        text = tensors["context_embedder.weight"].shape[1]
    check_heads(hidden, head, heads, known=head == sum(AXES), supported=str(sum(AXES)))
    return spec_of(
        Flux2Config(
            in_channels=values,
            num_layers=count_blocks(tensors),
            num_single_layers=count_blocks(tensors, "single_transformer_blocks"),
            num_attention_heads=hidden // head,
            joint_attention_dim=text,
            guidance_embeds="time_guidance_embed.guidance_embedder.linear_1.weight" in tensors,
        )
    )


def spec_of(settings: Flux2Config) -> ModelSpec:
    """The model of these sizes, for images of 1024 x 1024 pixels."""
    positions = Positions(
        "rotary",
        widths=settings.axes_dims_rope,
        theta=float(settings.rope_theta),
        turns_text=True,
        text_axis=True,
    )
    return replace(sizes_of("flux2", settings, MLP_RATIO), positions=positions)


def _layers(spec: ModelSpec) -> dict[str, Layers]:
    joined, width = "attn.to_qkv_mlp_proj", spec.hidden
    return layers_with(
        spec,
        mlp_layers("ff", "ff_context", "linear_in", "linear_out"),
        kv=(Slab(joined, width, 3 * width),),
        q_mlp=(Slab(joined, 0, width), Slab(joined, 3 * width)),
        proj=("attn.to_out",),
    )


def _row(_spec: ModelSpec, place: UnitPlace, name: str) -> Row:
    return ROWS[place.branch][name]


FAMILY = JointFamily(
    "FLUX.2",
    _layers,
    _row,
    {
        "attn": partial(AttnUnit, bias=False),
        "mlp": partial(MlpUnit, make=SwiGluMlp),
        "single": partial(SingleUnit, gated=True),
    },
    embedders="time_guidance_embed",
    kinds=("weight",),
)
FLUX2 = Architecture(
    "flux2",
    frozenset(f"{layer}.weight" for rows in ROWS.values() for layer, _ in rows.values()),
    spec_from_tensors,
    FAMILY.check_tensors,
    FAMILY.graph_kinds,
    folder=DiffusersFolder(
        ("Flux2Pipeline", "Flux2KleinPipeline"),
        "Flux2Transformer2DModel",
        spec_from_config,
        even_sigmas=True,
        fitted_shift=True,
    ),
)
