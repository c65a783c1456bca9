"""The decoder of an AutoencoderKLQwenImage as a graph: latents of an image to pixels, in float32.

It has the layers of Wan's causal VAE. An image is the first frame of a video: its causal
convolutions see only their last slice over time, and no frames are doubled. So all of them are
convolutions of images, and the decoder is one for tiles, as that of an AutoencoderKL.

Source: Qwen Team, "Qwen-Image Technical Report", 2025, section 2.3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from goc_deploy.errors import ModelError
from goc_deploy.exporters.checkpoint import Checkpoint
from goc_deploy.exporters.companions.vae import ResidualBlock, read_decoder
from goc_deploy.exporters.companions.wan_vae_config import (
    QWEN_VAE_CLASS,
    WanVaeConfig,
    wan_vae_config,
)
from goc_deploy.exporters.companions.wan_vae_model import Norm, PixelAttention, WanVaeDecoder
from goc_deploy.spec import ModelSpec


@dataclass(frozen=True)
class QwenVae:
    """A decoder that was read: its configuration, and its tensors for images."""

    config: WanVaeConfig
    checkpoint: Checkpoint

    def decoder(self) -> nn.Module:
        """The module that is traced."""
        return QwenVaeDecoder(self.config)


def read_qwen_vae_folder(path: Path, spec: ModelSpec) -> QwenVae:
    """Read an AutoencoderKLQwenImage folder, or the ``vae`` folder of a pipeline.

    Raises:
        ModelError: the model draws videos, or see `read_decoder`.
        SafetyError: see `read_decoder`.
    """
    if spec.video:
        raise ModelError(f"{path} is a VAE of images, but the model draws videos; give its own VAE")
    config, checkpoint = read_decoder(path, spec, QWEN_VAE_CLASS, _config, WanVaeDecoder)
    of_images = {
        name: _of_images(name, tensor)
        for name, tensor in checkpoint.tensors.items()
        if ".time_conv." not in name
    }
    return QwenVae(config, replace(checkpoint, tensors=of_images))


def _config(config: Mapping[str, Any], where: str) -> WanVaeConfig:
    settings = wan_vae_config(config, where, QWEN_VAE_CLASS)
    if settings.is_residual or settings.patch_size or settings.decoder_base_dim:
        raise ModelError(
            f"{where}: is_residual, patch_size and decoder_base_dim are settings of Wan 2.2, only "
            "the layers of Wan 2.1 are supported"
        )
    return settings


def _of_images(name: str, tensor: Tensor) -> Tensor:
    """The part of a tensor that acts on the first frame of a video, as a tensor for images."""
    if name.endswith(".gamma"):
        return tensor.reshape(-1, 1, 1)
    return tensor[:, :, -1] if tensor.ndim == 5 else tensor


def image_norm(channels: int) -> Norm:
    """The norm of (N, C, h, w) over its channels."""
    return Norm(channels, 4)


class MidBlock(nn.Module):
    """Two residual blocks with attention between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResidualBlock(width, width, image_norm) for _ in range(2))
        self.attentions = nn.ModuleList([PixelAttention(width)])

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) to the same shape."""
        before, after = self.resnets
        x = self.attentions[0](before(x)[:, :, None])[:, :, 0]
        return after(x)


class Upsampler(nn.Module):
    """Twice the height and width, and half the channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.Identity(), nn.Conv2d(width, width // 2, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) to (N, C / 2, 2*h, 2*w)."""
        return self.resample(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class UpBlock(nn.Module):
    """The residual blocks of one level, then a doubling unless it is the last."""

    def __init__(self, before: int, width: int, blocks: int, *, doubles: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResidualBlock(width if i else before, width, image_norm) for i in range(blocks)
        )
        if doubles:
            self.upsamplers = nn.ModuleList([Upsampler(width)])

    def forward(self, x: Tensor) -> Tensor:
        """(N, before, h, w) to the next level."""
        for layer in (*self.resnets, *getattr(self, "upsamplers", ())):
            x = layer(x)
        return x


class Decoder(nn.Module):
    """A middle block, then one level for every doubling."""

    def __init__(self, config: WanVaeConfig) -> None:
        super().__init__()
        widths, last = config.widths, len(config.widths) - 2
        self.conv_in = nn.Conv2d(config.z_dim, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0])
        self.up_blocks = nn.ModuleList(
            UpBlock(
                widths[i] // (2 if i else 1),
                widths[i + 1],
                config.num_res_blocks + 1,
                doubles=i < last,
            )
            for i in range(last + 1)
        )
        self.norm_out = image_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) to (N, channels, h*upscale, w*upscale)."""
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class QwenVaeDecoder(nn.Module):
    """Scaling of the latents, and the decoder."""

    def __init__(self, config: WanVaeConfig) -> None:
        super().__init__()
        self.config = config
        self.post_quant_conv = nn.Conv2d(config.z_dim, config.z_dim, 1)
        self.decoder = Decoder(config)

    def forward(self, latents: Tensor) -> Tensor:
        """Latents (N, C, h, w) to pixels (N, channels, h*upscale, w*upscale) in -1..1."""
        mean, std = (
            torch.tensor(values).reshape(1, -1, 1, 1)
            for values in (self.config.latents_mean, self.config.latents_std)
        )
        pixels = self.decoder(self.post_quant_conv(latents * std + mean))
        return torch.clamp(pixels, -1, 1)
