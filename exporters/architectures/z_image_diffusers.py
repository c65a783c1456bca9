"""A Z-Image that diffusers saved: its configuration, and the names and shapes of its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta, Struct
from torch import Tensor

from goc_deploy.blocks import (
    IMAGE_FEATURE,
    MAX_BLOCKS,
    STREAMS,
    TEXT_FEATURE,
    Blocks,
    Unit,
)
from goc_deploy.errors import ModelError
from goc_deploy.exporters.architectures.z_image_units import (
    CONDITION,
    FREQUENCIES,
    INNER,
    MULTIPLE,
)
from goc_deploy.exporters.folders import MAX_WIDTH, Setting, Settings
from goc_deploy.exporters.tracing import check_shapes
from goc_deploy.spec import ModelSpec, Positions

PATCH, TOKENS, SIDE = 2, 512, 128  # SIDE: of the usual latents, for images of 1024x1024 pixels
PIXELS_PER_LATENT, VAE_CHANNELS = 8, 16
KEY = f"{PATCH}-1"  # of the embedding and the final layer, by the sizes of their patches


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
    alone = tuple(Unit(branch, ("scale",)) for branch in ("attn", "mlp"))
    both = tuple(
        Unit(branch, ("scale",), (IMAGE_FEATURE, TEXT_FEATURE), STREAMS)
        for branch in ("attn", "mlp")
    )
    last = (Unit("attn", ("scale",), (IMAGE_FEATURE,), STREAMS), alone[1])
    runs = ((read.n_refiner_layers, alone), (read.n_layers - 1, both), (1, last))
    return ModelSpec(
        depth=depth,
        hidden=read.dim,
        heads=heads,
        mlp_hidden=int(read.dim / 3 * 8),
        patch=PATCH,
        grid=(SIDE // PATCH, SIDE // PATCH),
        channels=read.in_channels,
        choices=0,
        learn_sigma=False,
        architecture="z-image",
        blocks=tuple(Blocks(count, units) for count, units in runs if count),
        prediction_type="flow_to_noise",
        guided_channels=read.in_channels,
        caption_channels=read.cap_feat_dim,
        caption_tokens=TOKENS,
        positions=Positions("rotary", widths=widths, theta=read.rope_theta),
        max_grid=(SIDE // PATCH, SIDE // PATCH),
        vae_scale=PIXELS_PER_LATENT if read.in_channels == VAE_CHANNELS else 1,
        token_multiple=MULTIPLE,
    )


def spec_from_tensors(tensors: Mapping[str, Tensor], heads: int | None) -> ModelSpec:
    """Infer the sizes of a model from its tensors.

    Raises:
        ModelError: the sizes cannot be read, or another number of heads was given.
    """
    try:
        dim, of_patch = tensors[f"all_x_embedder.{KEY}.weight"].shape
        (head,) = tensors["layers.0.attention.norm_q.weight"].shape
        text = tensors["cap_embedder.1.weight"].shape[1]
    except (KeyError, ValueError) as cause:
        raise ModelError(
            f"the checkpoint looks like a Z-Image but its sizes cannot be read: {cause}"
        ) from cause
    if not head or head % 16 or dim % head or heads not in (None, dim // head):
        raise ModelError(
            f"the width {dim} has heads of {head} values; only multiples of 16 are supported, and "
            "`num_heads` must be their number"
        )
    side = 3 * head // 8  # values of a head for rows, and for columns, as in the public model
    layers, refiners = (
        len({name.split(".")[1] for name in tensors if name.startswith(f"{run}.")})
        for run in ("layers", "noise_refiner")
    )
    config = ZImageConfig(
        in_channels=of_patch // PATCH**2,
        dim=dim,
        n_layers=layers,
        n_refiner_layers=refiners,
        n_heads=dim // head,
        n_kv_heads=dim // head,
        cap_feat_dim=text,
        axes_dims=(head - 2 * side, side, side),
    )
    return spec_of(config, "the checkpoint")


def check_tensors(tensors: Mapping[str, Tensor], spec: ModelSpec) -> None:
    """Check names and shapes of tensors.

    Raises:
        ModelError: tensors are missing, unexpected or of another shape; the message lists up to ten
            of each.
    """
    what = f"a Z-Image of depth {spec.depth} and width {spec.hidden}"
    check_shapes(tensors, shapes_from_spec(spec), what)


def shapes_from_spec(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of a model."""
    width, inner, refiners = spec.hidden, spec.mlp_hidden, spec.blocks[0].count
    of_patch, text, head = spec.channels * PATCH**2, spec.caption_channels, width // spec.heads
    layers = {
        f"all_x_embedder.{KEY}": (width, of_patch),
        f"all_final_layer.{KEY}.linear": (of_patch, width),
        f"all_final_layer.{KEY}.adaLN_modulation.1": (width, CONDITION),
        "t_embedder.mlp.0": (INNER, FREQUENCIES),
        "t_embedder.mlp.2": (CONDITION, INNER),
        "cap_embedder.1": (width, text),
    }
    shapes: dict[str, tuple[int, ...]] = {"cap_embedder.0.weight": (text,)}
    shapes |= {"x_pad_token": (1, width), "cap_pad_token": (1, width)}
    runs = {"noise_refiner": refiners, "context_refiner": refiners}
    runs["layers"] = spec.depth - refiners
    for run, i in ((run, i) for run, count in runs.items() for i in range(count)):
        block = f"{run}.{i}"
        for part in ("to_q", "to_k", "to_v", "to_out.0"):
            shapes[f"{block}.attention.{part}.weight"] = (width, width)
        for part in ("q", "k"):
            shapes[f"{block}.attention.norm_{part}.weight"] = (head,)
        for norm in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
            shapes[f"{block}.{norm}.weight"] = (width,)
        for part in ("w1", "w3"):
            shapes[f"{block}.feed_forward.{part}.weight"] = (inner, width)
        shapes[f"{block}.feed_forward.w2.weight"] = (width, inner)
        if run != "context_refiner":
            layers[f"{block}.adaLN_modulation.0"] = (4 * width, CONDITION)
    for name, shape in layers.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def state_from_diffusers(
    tensors: Mapping[str, Tensor], spec: ModelSpec, where: Path
) -> tuple[ModelSpec, dict[str, Tensor]]:
    """The tensors, whose names are kept; `check_tensors` checks them."""
    del where
    return spec, dict(tensors)
