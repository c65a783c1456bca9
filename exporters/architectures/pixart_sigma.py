"""PixArt-Sigma: a PixArt-alpha with captions of 300 tokens, for images of 256 to 2048 pixels.

Its graphs are those of PixArt-alpha without the size of the image as an input. A distance of 1
between positions is that of two tokens in a model for 512 pixels, at every size. Public checkpoints
hold the position table. diffusers computes it.

The paper also compresses keys and values. That is not supported, and the published checkpoints do
not have it.

Source: Chen et al., "PixArt-Sigma: Weak-to-Strong Training of Diffusion Transformer for 4K
Text-to-Image Generation", ECCV 2024, section 3.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from goc_deploy.errors import ModelError
from goc_deploy.exporters.architectures import pixart, pixart_diffusers
from goc_deploy.exporters.architectures.contract import DiffusersFolder
from goc_deploy.exporters.architectures.pixart_diffusers import (
    BASE_SIDE,
    SETTINGS,
    SIDE_THAT_IS_TOLD,
    SIGMA,
    SIGMA_TOKENS,
    stretch,
)
from goc_deploy.spec import ModelSpec, Positions

_OTHER_ATTENTION = re.compile(r"blocks\.\d+\.attn\.(sr|norm|q_norm|k_norm)\.")


def spec_from_tensors(tensors: Mapping[str, Tensor], heads: int | None) -> ModelSpec:
    """Infer the sizes of a model from its tensors, like those of a PixArt-alpha.

    Raises:
        ModelError: the sizes are not consistent, the number of heads cannot be inferred, or the
            size of the image is an input of the model.
    """
    spec = pixart.spec_from_tensors(tensors, heads)
    if spec.told_size:
        raise ModelError(
            "the checkpoint has csize_embedder, because the size of the image is an input of the "
            "model; PixArt-Sigma has no such input: choose `model=pixart`"
        )
    tokens = spec.caption_tokens if pixart.NULL_CAPTION in tensors else SIGMA_TOKENS
    return replace(spec, architecture=SIGMA, caption_tokens=tokens)


def check_tensors(tensors: Mapping[str, Tensor], spec: ModelSpec) -> None:
    """Check that names and shapes of tensors are those of the architecture.

    Raises:
        ModelError: self-attention compresses keys and values or normalizes queries and keys, or
            tensors are missing, unexpected or of another shape; the message names them.
    """
    other = next(filter(_OTHER_ATTENTION.match, tensors), None)
    if other is not None:
        raise ModelError(
            f"the checkpoint has {other}; self-attention that compresses keys and values (sr, "
            "norm) or normalizes queries and keys (q_norm, k_norm) is not supported"
        )
    pixart.check_tensors(tensors, spec)


def spec_from_config(config: Mapping[str, Any], where: str) -> ModelSpec:
    """The sizes of the model that a ``config.json`` describes.

    Raises:
        ModelError: a setting is unknown, not supported or out of range; the message names it.
    """
    own = {"interpolation_scale": None, "use_additional_conditions": False}
    spec = pixart_diffusers.spec_from_config({**config, **own}, where)
    settings = SETTINGS.read(config, where)
    side, told = settings.sample_size, settings.use_additional_conditions
    scale, only = settings.interpolation_scale, side / BASE_SIDE
    if (stretch(side) if scale is None else scale) != only:
        raise ModelError(
            f"{where}: interpolation_scale is {scale}, only {only:g} is supported for a "
            f"PixArt-Sigma with sample_size {side}"
        )
    if told or (told is None and side == SIDE_THAT_IS_TOLD):
        raise ModelError(
            f"{where}: use_additional_conditions is {told} with sample_size {side}, only False is "
            "supported: the size of the image is no input of a PixArt-Sigma"
        )
    return replace(spec, architecture=SIGMA, caption_tokens=SIGMA_TOKENS)


def state_from_diffusers(
    tensors: Mapping[str, Tensor], spec: ModelSpec, where: Path
) -> tuple[ModelSpec, dict[str, Tensor]]:
    """The tensors of a PixArtTransformer2DModel under the names of the public layout.

    Returns:
        The spec, unchanged, and the tensors by name, with the position table of PixArt-Sigma.

    Raises:
        ModelError: tensors are missing or left over; the message lists them.
    """
    scale = spec.side / BASE_SIDE
    return spec, pixart_diffusers.state_with_positions(tensors, spec, where, scale)


def positions(spec: ModelSpec) -> Positions:
    """The positions of the reference."""
    return Positions("sine", base=spec.axes[0], stretch=spec.side / BASE_SIDE)


PIXART_SIGMA = replace(
    pixart.PIXART,
    name=SIGMA,
    telling_tensors=frozenset(),  # its null caption tells, see `pixart.spec_from_tensors`
    spec_from_tensors=spec_from_tensors,
    check_tensors=check_tensors,
    positions=positions,
    folder=DiffusersFolder(
        ("PixArtSigmaPipeline",),
        "PixArtTransformer2DModel",
        spec_from_config,
        state_from_diffusers,
        "ada_norm_single",
        pixart_diffusers.layers_in_diffusers,
    ),
)
