"""The ``config.json`` of an AutoencoderKLWan, or of a Qwen-Image's VAE, which has its layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from msgspec import Meta, Struct

from goc_deploy.errors import ModelError
from goc_deploy.exporters.folders import Setting, Settings

WAN_VAE_CLASS, QWEN_VAE_CLASS = "AutoencoderKLWan", "AutoencoderKLQwenImage"
MAX_DOUBLINGS = 5
# Of Wan 2.1 and of the A14B models of Wan 2.2, whose files may leave them out.
MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)
_Factor = Annotated[int, Meta(ge=1, le=64)]


class WanVaeConfig(Struct, frozen=True):
    """The settings that concern the decoder, with the defaults of diffusers.

    Attributes:
        base_dim: channels of the level of the image.
        decoder_base_dim: the same for the decoder alone, or None.
        z_dim: channels of the latents.
        dim_mult: channels of each level from the image to the latents, in ``base_dim``.
        num_res_blocks: residual blocks per level of the encoder; the decoder has one more.
        temperal_downsample: whether each doubling, from the image to the latents, is one of the
            frames too.
        latents_mean: mean of each channel of the latents.
        latents_std: its standard deviation.
        is_residual: whether levels have a shortcut (Wan 2.2, 5B).
        out_channels: channels of the decoder: 3 for each pixel of a patch.
        patch_size: pixels per side of the patches that the decoder makes, or None.
    """

    base_dim: Setting = 96
    decoder_base_dim: Setting | None = None
    z_dim: Setting = 16
    dim_mult: Annotated[tuple[_Factor, ...], Meta(min_length=1, max_length=MAX_DOUBLINGS + 1)] = (
        *(1, 2),
        *(4, 4),
    )
    num_res_blocks: Setting = 2
    temperal_downsample: Annotated[tuple[bool, ...], Meta(max_length=MAX_DOUBLINGS)] = (
        False,
        True,
        True,
    )
    latents_mean: tuple[float, ...] = MEAN
    latents_std: tuple[float, ...] = STD
    is_residual: bool = False
    out_channels: Setting = 3
    patch_size: Annotated[int, Meta(ge=1, le=8)] | None = None

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return self.z_dim

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of the middle block, then of each level."""
        base = self.decoder_base_dim or self.base_dim
        levels = [base * factor for factor in self.dim_mult[::-1]]
        return (levels[0], *levels)

    @property
    def doubles_time(self) -> tuple[bool, ...]:
        """For each doubling from the latents to the image, whether it doubles the frames."""
        return self.temperal_downsample[::-1]

    @property
    def image_channels(self) -> int:
        """Channels of the image."""
        return self.out_channels // (self.patch_size or 1) ** 2

    @property
    def upscale(self) -> int:
        """Image pixels per latent pixel and side."""
        return (self.patch_size or 1) * 2 ** len(self.doubles_time)

    @property
    def frames(self) -> int:
        """Frames of the video per frame of latents after the first."""
        return 2 ** sum(self.doubles_time)


_WITHOUT_EFFECT = (  # on the decoder
    "_diffusers_version",
    "_name_or_path",
    "dropout",
    "in_channels",
    "input_channels",
    "scale_factor_temporal",
    "scale_factor_spatial",
)


def wan_vae_config(
    config: Mapping[str, Any], where: str, own_class: str = WAN_VAE_CLASS
) -> WanVaeConfig:
    """The decoder that a ``config.json`` of a class describes.

    Raises:
        ModelError: a setting is unknown, not supported or out of range; the message names it.
    """
    required = {"_class_name": (own_class,), "attn_scales": ([],)}
    settings = Settings(WanVaeConfig, required, _WITHOUT_EFFECT).read(config, where)
    if len(settings.temperal_downsample) != len(settings.dim_mult) - 1:
        raise ModelError(
            f"{where}: temperal_downsample has {len(settings.temperal_downsample)} entries, "
            f"expected one less than dim_mult, which has {len(settings.dim_mult)}"
        )
    for name in ("latents_mean", "latents_std"):
        values = getattr(settings, name)
        if len(values) != settings.z_dim:
            raise ModelError(
                f"{where}: {name} has {len(values)} values, expected z_dim, {settings.z_dim}"
            )
    if settings.image_channels != 3 or settings.out_channels % (settings.patch_size or 1) ** 2:
        raise ModelError(
            f"{where}: out_channels is {settings.out_channels} with patch_size "
            f"{settings.patch_size}, expected 3 for each pixel of a patch"
        )
    _check_widths(settings, where)
    return settings


def _check_widths(settings: WanVaeConfig, where: str) -> None:
    """Check that every level can repeat its channels for its shortcut."""
    base = settings.decoder_base_dim or settings.base_dim
    for level, (before, after) in enumerate(
        zip(settings.widths[:-2], settings.widths[1:-1], strict=True)
    ):
        copies = after * 4 * (2 if settings.doubles_time[level] else 1)
        if settings.is_residual and copies % before:
            raise ModelError(
                f"{where}: dim_mult {list(settings.dim_mult)} of {base} does not divide into the "
                f"channels of level {level}"
            )
