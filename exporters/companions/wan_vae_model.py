"""The decoder of Wan's causal VAE as modules: one frame of latents, and caches in and out.

Parameter names are those of the state dict in diffusers. All tensors are (1, C, F, H, W).

The first frame of latents becomes one frame of the video, every later one four. One graph decodes
both kinds, so that the weights exist once. For the first frame, ``first`` is 1: the frames are
doubled as for any other, and only the last one of each doubling counts. Masks set the others to
zero before every convolution over time, which is the padding that the reference has there.

Source: Wan Team, "Wan: Open and Advanced Large-Scale Video Generative Models", 2025, section 4.1.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from goc_deploy.exporters.companions.wan_vae_config import WanVaeConfig
from goc_deploy.spec import CACHED_FRAMES, FrameCache

TINY = 1e-12


class Norm(nn.Module):
    """Root mean square norm over the channels."""

    def __init__(self, channels: int, dimensions: int) -> None:
        super().__init__()
        self.channels = channels
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * (dimensions - 2)))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, ...) to the same shape."""
        length = torch.sqrt((x * x).sum(1, keepdim=True))
        return x * (self.channels**0.5 / torch.clamp(length, min=TINY)) * self.gamma


class Memory:
    """The caches during one run, in the order of the convolutions.

    Args:
        first: (1,) float32, 1 for the first frame of latents and 0 for the others.
        caches: what the run before kept; zeros before the first frame.
    """

    def __init__(self, first: Tensor, caches: tuple[Tensor, ...]) -> None:
        self.first, self._caches = first.reshape(1, 1, 1, 1, 1), iter(caches)
        self.kept: list[Tensor] = []

    def extended(self, x: Tensor) -> Tensor:
        """(1, C, F, H, W) with the frames before it: (1, C, `CACHED_FRAMES` + F, H, W)."""
        frames = x.shape[2]
        if frames > 1:  # of which only the last one counts for the first frame of latents
            others = torch.tensor([1.0] * (frames - 1) + [0.0]).reshape(1, 1, frames, 1, 1)
            x = x * (1 - self.first * others)
        longer = torch.cat([next(self._caches), x], 2)
        self.kept.append(longer[:, :, -CACHED_FRAMES:])
        return longer

    def forget_first(self) -> None:
        """Keep nothing of the last convolution from the first frame of latents."""
        self.kept[-1] = self.kept[-1] * (1 - self.first)


class CausalConv(nn.Conv3d):
    """A convolution that sees frames of the past only."""

    def __init__(self, before: int, after: int, side: int = 3) -> None:
        super().__init__(before, after, (3, side, side), padding=(0, side // 2, side // 2))

    def over(self, x: Tensor, memory: Memory) -> Tensor:
        """(1, before, F, H, W) to (1, after, F, H, W)."""
        return self(memory.extended(x))


class ResidualBlock(nn.Module):
    """Two causal convolutions after norms, added to the input."""

    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = Norm(before, 5), Norm(width, 5)
        self.conv1, self.conv2 = CausalConv(before, width), CausalConv(width, width)
        if before != width:
            self.conv_shortcut = nn.Conv3d(before, width, 1)

    def over(self, x: Tensor, memory: Memory) -> Tensor:
        """(1, before, F, H, W) to (1, width, F, H, W)."""
        h = self.conv1.over(F.silu(self.norm1(x)), memory)
        h = self.conv2.over(F.silu(self.norm2(h)), memory)
        return h + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class PixelAttention(nn.Module):
    """Single-head attention over the pixels of a frame, added to the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = Norm(width, 4)
        self.to_qkv, self.proj = nn.Conv2d(width, 3 * width, 1), nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(1, C, 1, H, W) to the same shape; the middle block has one frame."""
        frame = x[:, :, 0]
        q, k, v = self.to_qkv(self.norm(frame)).flatten(2).chunk(3, 1)  # (1, C, H*W) each
        scores = torch.matmul(q.transpose(1, 2) * q.shape[1] ** -0.5, k)
        mixed = torch.matmul(v, torch.softmax(scores, -1).transpose(1, 2))
        return x + self.proj(mixed.reshape(frame.shape))[:, :, None]


class MidBlock(nn.Module):
    """Two residual blocks with attention between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResidualBlock(width, width) for _ in range(2))
        self.attentions = nn.ModuleList([PixelAttention(width)])

    def over(self, x: Tensor, memory: Memory) -> Tensor:
        """(1, C, 1, H, W) to the same shape."""
        before, after = self.resnets
        x = self.attentions[0](before.over(x, memory))  # type: ignore[operator]
        return after.over(x, memory)  # type: ignore[operator]


class Doubling(nn.Module):
    """Twice the frames, if it doubles time, and twice the height and width."""

    def __init__(self, width: int, after: int, *, doubles_time: bool) -> None:
        super().__init__()
        self.time_conv = CausalConv(width, 2 * width, side=1) if doubles_time else None
        self.resample = nn.Sequential(nn.Identity(), nn.Conv2d(width, after, 3, padding=1))

    def over(self, x: Tensor, memory: Memory) -> Tensor:
        """(1, width, F, H, W) to (1, after, F or 2*F, 2*H, 2*W)."""
        if self.time_conv is not None:
            _, width, frames, *size = x.shape
            made = self.time_conv.over(x, memory).reshape(1, 2, width, frames, *size)
            memory.forget_first()  # the first frame of latents skips this convolution
            made = made.permute(0, 2, 3, 1, 4, 5)  # (1, C, F, 2, H, W)
            first = memory.first[..., None]
            x = (first * x[:, :, :, None] + (1 - first) * made).reshape(1, width, -1, *size)
        images = x.transpose(1, 2).flatten(0, 1)  # (F, C, H, W)
        images = self.resample(F.interpolate(images, scale_factor=2.0, mode="nearest"))
        return images.transpose(0, 1)[None]


class Repeated(nn.Module):
    """The shortcut around a level: channels are copied or moved to pixels and frames."""

    def __init__(self, before: int, after: int, frames: int) -> None:
        super().__init__()
        self.after, self.frames, self.repeats = after, frames, after * frames * 4 // before

    def forward(self, x: Tensor) -> Tensor:
        """(1, before, F, H, W) to (1, after, F*frames, 2*H, 2*W)."""
        _, _, count, height, width = x.shape
        x = torch.stack([x] * self.repeats, 2)
        x = x.reshape(self.after, self.frames, 2, 2, count, height, width)
        x = x.permute(0, 4, 1, 5, 2, 6, 3)
        return x.reshape(1, self.after, count * self.frames, 2 * height, 2 * width)


class UpBlock(nn.Module):
    """The residual blocks of one level, then a doubling unless it is the last."""

    def __init__(
        self, before: int, width: int, config: WanVaeConfig, *, doubles: bool, doubles_time: bool
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResidualBlock(before if i == 0 else width, width)
            for i in range(config.num_res_blocks + 1)
        )
        if doubles and config.is_residual:
            self.upsampler = Doubling(width, width, doubles_time=doubles_time)
            self.avg_shortcut = Repeated(before, width, 2 if doubles_time else 1)
        elif doubles:
            doubling = Doubling(width, width // 2, doubles_time=doubles_time)
            self.upsamplers = nn.ModuleList([doubling])

    def over(self, x: Tensor, memory: Memory) -> Tensor:
        """(1, before, F, H, W) to the next level."""
        start = x
        for block in self.resnets:
            x = block.over(x, memory)  # type: ignore[operator]
        if hasattr(self, "upsampler"):
            return self.upsampler.over(x, memory) + self.avg_shortcut(start)
        for doubling in getattr(self, "upsamplers", ()):
            x = doubling.over(x, memory)
        return x


class Decoder(nn.Module):
    """A middle block, then one level for every doubling."""

    def __init__(self, config: WanVaeConfig) -> None:
        super().__init__()
        widths = config.widths
        self.conv_in = CausalConv(config.z_dim, widths[0])
        self.mid_block = MidBlock(widths[0])
        self.up_blocks = nn.ModuleList(
            UpBlock(
                widths[i] // (2 if i and not config.is_residual else 1),
                widths[i + 1],
                config,
                doubles=i < len(config.doubles_time),
                doubles_time=i < len(config.doubles_time) and config.doubles_time[i],
            )
            for i in range(len(widths) - 1)
        )
        self.norm_out = Norm(widths[-1], 5)
        self.conv_out = CausalConv(widths[-1], config.out_channels)

    def over(self, x: Tensor, memory: Memory) -> Tensor:
        """(1, C, 1, h, w) to (1, out_channels, frames, h*side, w*side)."""
        x = self.mid_block.over(self.conv_in.over(x, memory), memory)
        for block in self.up_blocks:
            x = block.over(x, memory)  # type: ignore[operator]
        return self.conv_out.over(F.silu(self.norm_out(x)), memory)


class WanVaeDecoder(nn.Module):
    """Scaling of the latents, the decoder, and the patches of the image."""

    def __init__(self, config: WanVaeConfig) -> None:
        super().__init__()
        self.config = config
        self.post_quant_conv = nn.Conv3d(config.z_dim, config.z_dim, 1)
        self.decoder = Decoder(config)

    def forward(self, latents: Tensor, first: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        """Decode one frame of latents.

        Args:
            latents: (1, C, 1, h, w), as the diffusion model makes them.
            first: (1,), 1 for the first frame of a video and 0 for the others.
            caches: what the run before kept; zeros before the first frame.

        Returns:
            Pixels (1, channels, frames, h*upscale, w*upscale) in -1..1, of which only the last
            frame counts if ``first`` is 1; then what the convolutions keep.
        """
        mean, std = (
            torch.tensor(v).reshape(1, -1, 1, 1, 1)
            for v in (self.config.latents_mean, self.config.latents_std)
        )
        memory = Memory(first, caches)
        pixels = self.decoder.over(self.post_quant_conv(latents * std + mean), memory)
        return (torch.clamp(self._from_patches(pixels), -1, 1), *memory.kept)

    def _from_patches(self, x: Tensor) -> Tensor:
        """(1, C*p*p, F, H, W) to (1, C, F, H*p, W*p)."""
        side = self.config.patch_size or 1
        if side == 1:
            return x
        _, parts, frames, height, width = x.shape
        x = x.reshape(1, parts // side**2, side, side, frames, height, width)
        x = x.permute(0, 1, 4, 5, 3, 6, 2)
        return x.reshape(1, parts // side**2, frames, height * side, width * side)


def frame_caches(decoder: WanVaeDecoder) -> tuple[FrameCache, ...]:
    """The caches of a decoder, in the order of its inputs."""
    return tuple(_caches(decoder.decoder))


def _caches(decoder: Decoder) -> Iterator[FrameCache]:
    side = 1
    for name, module in decoder.named_modules():  # registered in the order of execution
        if isinstance(module, CausalConv):
            yield FrameCache(module.in_channels, side)
        if name.endswith("resample"):
            side *= 2
