"""The decoder of an AutoencoderKL as a graph: latents of the diffusion model to pixels, in float32.

Parameter names are those of the state dict in diffusers. The scale and shift of the latents are
constants of the graph.

Source: Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", CVPR 2022,
section 3.1 and appendix E.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from msgspec import Meta, Struct
from torch import Tensor, nn

from goc_deploy.engine_dir.manifest import IMAGE_CHANNELS
from goc_deploy.errors import ModelError
from goc_deploy.exporters.checkpoint import Checkpoint
from goc_deploy.exporters.folders import (
    CONFIG,
    Setting,
    Settings,
    part_of_pipeline,
    read_json,
    read_weights,
)
from goc_deploy.exporters.tracing import Examples, check_shapes, empty_module, same_names, shapes_of
from goc_deploy.exporters.units import GraphKind, Input
from goc_deploy.precision import Precision
from goc_deploy.spec import DecoderSpec, ModelSpec

DECODER = "decoder"  # name of the graph
# The decoder of Stable Diffusion overflows in fp16, and it runs only once per image.
PRECISION: Precision = "fp32"
NORM_EPSILON = 1e-6
OVERLAP_SHARE = 4  # adjacent tiles overlap by a quarter of a tile
MAX_FACTOR = 1e4
UP_BLOCK = "UpDecoderBlock2D"
_Width = Annotated[int, Meta(ge=1, le=2**14)]
_ENCODER = ("encoder.", "quant_conv.")
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_ATTENTION = re.compile(r"(decoder\.mid_block\.attentions\.0)\.([\w.]+)\.(weight|bias)")
_NORM = re.compile(r"decoder\..*norm\w*\.(weight|bias)")


class VaeConfig(
    Struct,
    frozen=True,
    rename={
        "image_channels": "out_channels",
        "widths": "block_out_channels",
        "layers": "layers_per_block",
        "groups": "norm_num_groups",
        "scaling": "scaling_factor",
        "has_post_quant": "use_post_quant_conv",
        "has_attention": "mid_block_add_attention",
    },
):
    """The settings of ``config.json`` that concern the decoder, with the defaults of diffusers.

    Attributes:
        latent_channels: channels of the latents.
        image_channels: channels of the image.
        widths: channels of the levels, from that of the image to that of the latents.
        layers: residual blocks per level of the encoder; the decoder has one more.
        groups: groups of every group norm.
        scaling: number that the latents are divided by.
        shift_factor: number that is added to the latents after the division.
        up_block_types: class of every level, or None for the current default.
        has_post_quant: whether a 1x1 convolution precedes the decoder.
        has_attention: whether the middle block has attention.
    """

    latent_channels: Setting = 4
    image_channels: Setting = 3
    widths: Annotated[tuple[_Width, ...], Meta(min_length=1, max_length=8)] = (64,)
    layers: Setting = 1
    groups: Setting = 32
    scaling: Annotated[float, Meta(gt=0, lt=MAX_FACTOR)] = 0.18215
    shift_factor: Annotated[float, Meta(ge=-MAX_FACTOR, le=MAX_FACTOR)] | None = None
    up_block_types: tuple[str, ...] | None = None
    has_post_quant: bool = True
    has_attention: bool = True

    @property
    def shift(self) -> float:
        """Number that is added to the latents after the division."""
        return self.shift_factor or 0.0

    @property
    def upscale(self) -> int:
        """Image pixels per latent pixel."""
        return 2 ** (len(self.widths) - 1)


SETTINGS = Settings(
    VaeConfig,
    required={
        "_class_name": ("AutoencoderKL",),
        "act_fn": ("silu",),
        "latents_mean": (None,),
        "latents_std": (None,),
    },
    without_effect=(  # on the decoder
        "_diffusers_version",
        "_name_or_path",
        "in_channels",
        "down_block_types",
        "sample_size",
        "force_upcast",
        "use_quant_conv",
    ),
)


@dataclass(frozen=True)
class Vae:
    """A decoder that was read: its configuration, and its tensors under current names."""

    config: VaeConfig
    checkpoint: Checkpoint

    def decoder(self) -> nn.Module:
        """The module that is traced."""
        return VaeDecoder(self.config)


class DecoderConfig(Protocol):
    """What every configuration of a decoder has."""

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""


ConfigT = TypeVar("ConfigT", bound=DecoderConfig)


def read_vae_folder(path: Path, spec: ModelSpec) -> Vae:
    """Read an AutoencoderKL folder, or the ``vae`` folder of a pipeline; see `read_decoder`."""
    return Vae(*read_decoder(path, spec, "AutoencoderKL", vae_config, VaeDecoder, _current))


def read_decoder(
    path: Path,
    spec: ModelSpec,
    saved: str,
    config_from: Callable[[Mapping[str, Any], str], ConfigT],
    make: Callable[[ConfigT], nn.Module],
    current: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = dict,
) -> tuple[ConfigT, Checkpoint]:
    """Read the decoder of a VAE, and leave out the weights of its encoder.

    Args:
        path: the folder of the VAE, or of a pipeline.
        spec: the model.
        saved: the class that diffusers saved.
        config_from: reads ``config.json``; the second argument names the file in messages.
        make: makes the decoder, whose tensors must be those of the folder.
        current: renames tensors of old files.

    Raises:
        ModelError: the folder is not such a folder, a setting is not supported, the weights are
            missing, damaged, or do not fit the configuration, or the number of latent channels does
            not fit the model.
        SafetyError: an index names files outside the folder.
    """
    folder = part_of_pipeline(path, "vae", f"diffusers saved an {saved} to")
    where = f"{folder / CONFIG}"
    config = config_from(read_json(folder / CONFIG), where)
    if config.latent_channels != spec.channels:
        raise ModelError(
            f"{where}: the VAE decodes {config.latent_channels} channels but the model makes "
            f"{spec.channels}; give the VAE that it was trained with"
        )
    files, stored = read_weights(folder)
    tensors = current({name: t for name, t in stored.items() if not name.startswith(_ENCODER)})
    check_shapes(
        tensors, shapes_of(lambda: make(config)), f"the VAE decoder that {where} describes"
    )
    return config, Checkpoint(folder, tensors, "plain", (folder / CONFIG, *files))


def _current(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under current names, with the shapes that `VaeDecoder` has."""
    tensors = {_current_name(name): tensor for name, tensor in stored.items()}
    for name, tensor in tensors.items():
        if _ATTENTION.fullmatch(name) and tensor.ndim == 4:
            tensors[name] = tensor.reshape(tensor.shape[:2])  # the oldest files have convolutions
        elif _NORM.fullmatch(name):
            tensors[name] = tensor.reshape(-1, 1, 1)
    return tensors


def vae_config(config: Mapping[str, Any], where: str) -> VaeConfig:
    """The decoder that a ``config.json`` describes.

    Raises:
        ModelError: a setting is unknown, not supported or out of range; the message names it.
    """
    settings = SETTINGS.read(config, where)
    if any(width % settings.groups for width in settings.widths):
        raise ModelError(
            f"{where}: block_out_channels {list(settings.widths)} must be multiples of "
            "norm_num_groups"
        )
    kinds = settings.up_block_types
    if kinds not in (None, (UP_BLOCK,) * len(settings.widths)):
        raise ModelError(
            f"{where}: up_block_types is {kinds!r}, only {UP_BLOCK} once per level is supported"
        )
    if settings.image_channels not in IMAGE_CHANNELS:
        raise ModelError(f"{where}: out_channels is {settings.image_channels}, images have 1 or 3")
    return settings


class ImageDecoderConfig(Protocol):
    """The sizes of a decoder of images that do not depend on the model."""

    @property
    def image_channels(self) -> int:
        """Channels of the image."""

    @property
    def upscale(self) -> int:
        """Image pixels per latent pixel."""


def decoder_spec(config: ImageDecoderConfig, spec: ModelSpec, largest_tile: int) -> DecoderSpec:
    """Tiles of the model's latents: a single tile if they fit into ``largest_tile`` per side."""
    tile = min(spec.side, largest_tile)
    return DecoderSpec(
        config.image_channels, config.upscale, tile, max(1, min(tile - 1, tile // OVERLAP_SHARE))
    )


def decoder_kind(make: Callable[[], nn.Module], spec: ModelSpec, decoder: DecoderSpec) -> GraphKind:
    """The graph of the decoder that ``make`` returns, for tiles.

    Inputs: latents (n, C, t, t) float32. Outputs: pixels (n, channels, t*upscale, t*upscale)
    float32, in -1..1.
    """
    examples = Examples(spec, torch.float32)
    tiles = examples.normal(2, spec.channels, decoder.tile, decoder.tile)
    module = empty_module(make, torch.float32, examples.generator)
    return GraphKind(
        DECODER,
        module,
        (Input("latents", tiles, {0: "tiles"}),),
        ("pixels",),
        {DECODER: same_names(module)},
    )


class VaeDecoder(nn.Module):
    """Scaling of the latents, and the decoder."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        self.scaling, self.shift = config.scaling, config.shift
        self.decoder = Decoder(config)
        channels = config.latent_channels
        self.post_quant_conv = (
            nn.Conv2d(channels, channels, 1) if config.has_post_quant else nn.Identity()
        )

    def forward(self, latents: Tensor) -> Tensor:
        """Scaled latents (N, C, h, w) to pixels (N, channels, h*upscale, w*upscale)."""
        return self.decoder(self.post_quant_conv(latents / self.scaling + self.shift))


class Decoder(nn.Module):
    """A middle block with attention, then one level for every doubling of the resolution."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        widths, groups = config.widths[::-1], config.groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups, attention=config.has_attention)
        self.up_blocks = nn.ModuleList(
            UpBlock(before, width, config.layers + 1, groups, doubles=level < len(widths) - 1)
            for level, (before, width) in enumerate(pairwise((widths[0], *widths)))
        )
        self.conv_norm_out = Norm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], config.image_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Latents (N, C, h, w) to pixels (N, channels, h*upscale, w*upscale)."""
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Norm(nn.Module):
    """Group norm; its parameters have the shape (C, 1, 1).

    The ONNX exporter would copy them if they had to be reshaped in the graph.
    """

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.weight, self.bias = (
            nn.Parameter(torch.ones(channels, 1, 1)),
            nn.Parameter(torch.zeros(channels, 1, 1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) to (N, C, h, w)."""
        return F.group_norm(x, self.groups, eps=NORM_EPSILON) * self.weight + self.bias


class MidBlock(nn.Module):
    """Two residual blocks with attention between them."""

    def __init__(self, width: int, groups: int, *, attention: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResidualBlock(width, width, partial(Norm, groups=groups)) for _ in range(2)
        )
        self.attentions = nn.ModuleList([PixelAttention(width, groups)] if attention else [])

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) to (N, C, h, w)."""
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class UpBlock(nn.Module):
    """The residual blocks of one level, then a doubling of the resolution."""

    def __init__(self, before: int, width: int, layers: int, groups: int, *, doubles: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResidualBlock(before if i == 0 else width, width, partial(Norm, groups=groups))
            for i in range(layers)
        )
        self.upsamplers = nn.ModuleList([Doubling(width)] if doubles else [])

    def forward(self, x: Tensor) -> Tensor:
        """(N, before, h, w) to (N, width, h, w), or to (N, width, 2*h, 2*w) if it doubles."""
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


class ResidualBlock(nn.Module):
    """Two convolutions after norms, added to the input.

    Args:
        before: channels of the input.
        width: channels of the output.
        norm: makes the norm of a number of channels.
    """

    def __init__(self, before: int, width: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(before), norm(width)
        self.conv1 = nn.Conv2d(before, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        if before != width:
            self.conv_shortcut = nn.Conv2d(before, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, before, h, w) to (N, width, h, w)."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class Doubling(nn.Module):
    """Nearest-neighbor upsampling by two, then a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) to (N, C, 2*h, 2*w)."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class PixelAttention(nn.Module):
    """Single-head attention over all pixels, added to the input."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.group_norm = Norm(width, groups)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) to (N, C, h, w)."""
        batch, channels, height, width = x.shape
        pixels = self.group_norm(x).flatten(2).transpose(1, 2).reshape(-1, channels)  # (N*h*w, C)
        q, k, v = (
            layer(pixels).reshape(batch, -1, channels)
            for layer in (self.to_q, self.to_k, self.to_v)
        )
        # (N, h*w, h*w)
        weights = torch.softmax(torch.matmul(q * channels**-0.5, k.transpose(1, 2)), dim=-1)
        mixed = self.to_out[0](torch.matmul(weights, v).reshape(-1, channels)).reshape(
            batch, -1, channels
        )
        return x + mixed.transpose(1, 2).reshape(batch, channels, height, width)


def _current_name(name: str) -> str:
    """The current diffusers name of a tensor; attention layers of old files have other names."""
    match = _ATTENTION.fullmatch(name)
    return f"{match[1]}.{_OLD_ATTENTION.get(match[2], match[2])}.{match[3]}" if match else name
