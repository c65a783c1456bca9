"""A Wan that diffusers saved: its configuration, and the names and shapes of its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec import Struct
from torch import Tensor

from goc_deploy.blocks import MAX_BLOCKS
from goc_deploy.errors import ModelError
from goc_deploy.exporters.architectures.pixart_diffusers import BRANCHES, ROWS_OF_BRANCHES
from goc_deploy.exporters.folders import MAX_WIDTH, Setting, Settings
from goc_deploy.exporters.tracing import check_shapes
from goc_deploy.spec import ModelSpec, Positions

PATCH, TOKENS, FREQUENCIES = 2, 512, 256


class WanConfig(Struct, frozen=True, kw_only=True):
    """The settings of a WanTransformer3DModel that are read."""

    num_attention_heads: Setting = 40
    attention_head_dim: Setting = 128
    in_channels: Setting = 16
    out_channels: int | None = 16
    text_dim: Setting = 512
    ffn_dim: Setting = 13824
    num_layers: Setting = 40
    rope_max_seq_len: Setting = 1024


SETTINGS = Settings(
    WanConfig,
    required={
        "_class_name": ("WanTransformer3DModel",),
        "patch_size": ([1, PATCH, PATCH],),
        "freq_dim": (FREQUENCIES,),
        "cross_attn_norm": (True,),
        "qk_norm": ("rms_norm_across_heads",),
        "eps": (1e-6,),
        "image_dim": (None,),  # models that start from a picture have it
        "added_kv_proj_dim": (None,),
        "pos_embed_seq_len": (None,),
    },
)
# Latent channels -> pixels per latent pixel and side, and the usual sample (frames, height, width)
# of the latents: 81 frames of 832x480 with the VAE of Wan 2.1, 121 of 1280x704 with that of 2.2.
SAMPLES = {16: (8, (21, 60, 104)), 48: (16, (31, 44, 80))}
FRAMES_PER_LATENT = 4
OTHER_SAMPLE = (8, 32, 32)  # of other numbers of channels, which are of no public VAE


def spec_from_config(config: Mapping[str, Any], where: str) -> ModelSpec:
    """The sizes of the model that a ``config.json`` describes.

    Raises:
        ModelError: a setting is unknown, not supported or out of range; the message names it.
    """
    settings = SETTINGS.read(config, where)
    heads, head, channels = (
        settings.num_attention_heads,
        settings.attention_head_dim,
        settings.in_channels,
    )
    if settings.out_channels not in (None, channels):
        raise ModelError(
            f"{where}: in_channels is {channels} and out_channels {settings.out_channels}; models "
            "that start from a picture or a video are not supported"
        )
    if head % 2 or head < 12 or heads * head > MAX_WIDTH:
        raise ModelError(
            f"{where}: attention_head_dim is {head} and num_attention_heads {heads}; a head must "
            f"be even and at least 12 wide, and all together at most {MAX_WIDTH}"
        )
    if settings.num_layers > MAX_BLOCKS:
        raise ModelError(
            f"{where}: num_layers is {settings.num_layers}, at most {MAX_BLOCKS} are supported"
        )
    return spec_of(
        settings.num_layers,
        heads,
        head,
        ffn=settings.ffn_dim,
        channels=channels,
        text=settings.text_dim,
    )


def spec_of(depth: int, heads: int, head: int, *, ffn: int, channels: int, text: int) -> ModelSpec:
    """The model of these sizes, for the sample that its VAE suggests."""
    scale, (frames, height, width) = SAMPLES.get(channels, (1, OTHER_SAMPLE))
    grid = (frames, height // PATCH, width // PATCH)
    side = 2 * (head // 6)  # values of a head for rows, and for columns; the rest is for frames
    return ModelSpec(
        depth=depth,
        hidden=heads * head,
        heads=heads,
        mlp_hidden=ffn,
        patch=PATCH,
        grid=grid,
        channels=channels,
        choices=0,
        learn_sigma=False,
        architecture="wan",
        branches=BRANCHES,
        rows=ROWS_OF_BRANCHES,
        prediction_type="flow_to_noise",
        guided_channels=channels,
        caption_channels=text,
        caption_tokens=TOKENS,
        positions=Positions("rotary", widths=(head - 2 * side, side, side)),
        max_grid=grid,
        vae_scale=scale,
        vae_frames=FRAMES_PER_LATENT if channels in SAMPLES else 1,
    )


def check_tensors(tensors: Mapping[str, Tensor], spec: ModelSpec) -> None:
    """Check names and shapes of tensors.

    Raises:
        ModelError: tensors are missing, unexpected or of another shape; the message lists up to ten
            of each.
    """
    what = f"a Wan of depth {spec.depth} and width {spec.hidden}"
    check_shapes(tensors, shapes_from_spec(spec), what)


def shapes_from_spec(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of a model."""
    width, inner, text = spec.hidden, spec.mlp_hidden, spec.caption_channels
    layers = {
        "condition_embedder.time_embedder.linear_1": (width, FREQUENCIES),
        "condition_embedder.time_embedder.linear_2": (width, width),
        "condition_embedder.time_proj": (6 * width, width),
        "condition_embedder.text_embedder.linear_1": (width, text),
        "condition_embedder.text_embedder.linear_2": (width, width),
        "proj_out": (spec.channels * PATCH**2, width),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "scale_shift_table": (1, 2, width),
        "patch_embedding.weight": (width, spec.channels, 1, PATCH, PATCH),
        "patch_embedding.bias": (width,),
    }
    for i in range(spec.depth):
        block = f"blocks.{i}"
        shapes[f"{block}.scale_shift_table"] = (1, 6, width)
        for kind in ("weight", "bias"):
            shapes[f"{block}.norm2.{kind}"] = (width,)
        for attn in ("attn1", "attn2"):
            for part in ("to_q", "to_k", "to_v", "to_out.0"):
                layers[f"{block}.{attn}.{part}"] = (width, width)
            shapes |= {f"{block}.{attn}.norm_{part}.weight": (width,) for part in "qk"}
        layers[f"{block}.ffn.net.0.proj"] = (inner, width)
        layers[f"{block}.ffn.net.2"] = (width, inner)
    for name, shape in layers.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes
