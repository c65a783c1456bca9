"""The decoder of an AutoencoderKLWan as a graph, which decodes a video frame by frame.

It is in float32. The mean and standard deviation of the latents are constants of the graph. What
the causal convolutions keep between frames is in inputs and outputs, so that memory does not grow
with the length of the video.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from goc_deploy.exporters.checkpoint import Checkpoint
from goc_deploy.exporters.companions.vae import OVERLAP_SHARE, read_decoder
from goc_deploy.exporters.companions.wan_vae_config import (
    WAN_VAE_CLASS,
    WanVaeConfig,
    wan_vae_config,
)
from goc_deploy.exporters.companions.wan_vae_model import WanVaeDecoder, frame_caches
from goc_deploy.exporters.tracing import Examples, empty_module, same_names
from goc_deploy.exporters.units import GraphKind, Input
from goc_deploy.precision import Precision
from goc_deploy.spec import ModelSpec, VideoDecoderSpec

VIDEO_DECODER = "video_decoder"  # name of the graph
PRECISION: Precision = "fp32"
TRACED_SIZE = (4, 6)  # latent pixels; both are dynamic dimensions


@dataclass(frozen=True)
class WanVae:
    """A decoder that was read."""

    config: WanVaeConfig
    checkpoint: Checkpoint


def read_wan_vae_folder(path: Path, spec: ModelSpec) -> WanVae:
    """Read an AutoencoderKLWan folder, or the ``vae`` folder of a pipeline; see `read_decoder`."""
    return WanVae(*read_decoder(path, spec, WAN_VAE_CLASS, wan_vae_config, WanVaeDecoder))


def video_decoder_spec(config: WanVaeConfig, tile: int = 0) -> VideoDecoderSpec:
    """The sizes of the decoder, of its caches and, unless 0, of its tiles."""
    with torch.device("meta"):
        caches = frame_caches(WanVaeDecoder(config))
    overlap = max(1, min(tile - 1, tile // OVERLAP_SHARE)) if tile else 0
    return VideoDecoderSpec(
        config.z_dim,
        config.image_channels,
        config.upscale,
        config.frames,
        caches,
        tile,
        overlap,
    )


def video_decoder_kind(config: WanVaeConfig, spec: ModelSpec) -> GraphKind:
    """The graph of the decoder, for one frame of latents of any height h and width w.

    Inputs: latents (1, C, 1, h, w) and first (1,) float32, and ``cache_0``, ... as in
    `goc_deploy.spec.VideoDecoderSpec`. Outputs: pixels (1, channels, frames, h*upscale, w*upscale)
    float32 in -1..1, of which only the last frame counts if ``first`` is 1; then ``kept_0``, ...
    """
    sizes = video_decoder_spec(config)
    examples = Examples(spec, torch.float32)
    height, width = TRACED_SIZE
    latents = examples.normal(1, config.z_dim, 1, height, width)
    caches = tuple(
        Input(
            f"cache_{i}",
            examples.normal(*sizes.cache_shape(cache, height, width)),
            {3: _multiple(cache.upscale, "height"), 4: _multiple(cache.upscale, "width")},
        )
        for i, cache in enumerate(sizes.caches)
    )
    module = empty_module(lambda: WanVaeDecoder(config), torch.float32, examples.generator)
    # Halfway between both kinds of frames, so that the comparison with PyTorch sees both.
    first = Input("first", torch.tensor([0.5]), {})
    return GraphKind(
        VIDEO_DECODER,
        module,
        (Input("latents", latents, {3: "height", 4: "width"}), first, *caches),
        ("pixels", *(f"kept_{i}" for i in range(len(caches)))),
        {VIDEO_DECODER: same_names(module)},
    )


def _multiple(factor: int, symbol: str) -> str:
    return symbol if factor == 1 else f"{factor}*{symbol}"
