"""A small AutoencoderKL in diffusers' layout.

The encoder, which only training needs, is in front of the exporter's decoder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from goc_deploy.exporters.companions.vae import (
    Decoder,
    MidBlock,
    Norm,
    ResidualBlock,
    VaeConfig,
    vae_config,
)

CONFIG_FILE, WEIGHTS_FILE = "config.json", "diffusion_pytorch_model.safetensors"
WIDTHS = [16, 32, 32]
CONFIG: Mapping[str, Any] = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": WIDTHS,
    "down_block_types": ["DownEncoderBlock2D"] * len(WIDTHS),
    "in_channels": 1,
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "out_channels": 1,
    "sample_size": 28,
    "up_block_types": ["UpDecoderBlock2D"] * len(WIDTHS),
}
ENCODING_BATCH = 500


class Halving(nn.Module):
    """A convolution that keeps every other pixel; the padding is diffusers'."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class DownBlock(nn.Module):
    """Residual blocks of one level, then half the side."""

    def __init__(self, before: int, width: int, config: VaeConfig, *, halves: bool) -> None:
        super().__init__()
        norm = partial(Norm, groups=config.groups)
        self.resnets = nn.ModuleList(
            ResidualBlock(before if i == 0 else width, width, norm) for i in range(config.layers)
        )
        self.downsamplers = nn.ModuleList([Halving(width)] if halves else [])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class Encoder(nn.Module):
    """Images to twice as many channels as latents have."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        widths = config.widths
        self.conv_in = nn.Conv2d(config.image_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownBlock(before, width, config, halves=level < len(widths) - 1)
            for level, (before, width) in enumerate(pairwise((widths[0], *widths)))
        )
        self.mid_block = MidBlock(widths[-1], config.groups, attention=config.has_attention)
        self.conv_norm_out = Norm(widths[-1], config.groups)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Autoencoder(nn.Module):
    """Encoder and decoder under diffusers' names; latents here are not scaled."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        channels = config.latent_channels
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.post_quant_conv = nn.Conv2d(channels, channels, 1)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance of the latents, each (N, C, h, w)."""
        mean, log_variance = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return mean, log_variance.clamp(-30, 20)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents to images in about [-1, 1]."""
        return self.decoder(self.post_quant_conv(latents))


def save_folder(model: Autoencoder, scaling: float, folder: Path) -> None:
    """Write what ``AutoencoderKL.from_pretrained`` and ``goc-export --vae`` read."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        name: tensor.flatten() if "norm" in name else tensor
        for name, tensor in model.state_dict().items()
    }
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / WEIGHTS_FILE)
    text = json.dumps({**CONFIG, "scaling_factor": scaling}, indent=1)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def load_folder(folder: Path) -> tuple[Autoencoder, VaeConfig]:
    """What `save_folder` wrote."""
    path = folder / CONFIG_FILE
    config = vae_config(json.loads(path.read_text(encoding="utf-8")), str(path))
    model = Autoencoder(config).eval()
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    model.load_state_dict(
        {n: t.reshape(shapes[n]) for n, t in load_file(folder / WEIGHTS_FILE).items()}
    )
    return model, config


@torch.inference_mode()
def encoded(folder: Path, images: Tensor) -> Tensor:
    """Scaled latents (N, C, h, w) of images, without noise."""
    model, config = load_folder(folder)
    means = [
        model.encode(images[first : first + ENCODING_BATCH])[0]
        for first in range(0, len(images), ENCODING_BATCH)
    ]
    return (torch.cat(means) - config.shift) * config.scaling
