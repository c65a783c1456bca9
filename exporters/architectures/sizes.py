"""Sizes of a model, inferred from the tensors that DiT and PixArt have in common."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from goc_deploy.errors import ModelError

_BLOCK = re.compile(r"blocks\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of a DiT or a PixArt, whose tensors have the same names.

    Attributes:
        depth: number of blocks.
        hidden: D, width of the tokens.
        mlp_hidden: width of the hidden layer of the MLP.
        channels: C of the latents.
        patch: height of a patch.
        patch_width: width of a patch.
        tokens: T, rows of the position table.
        predicted: values per token that the final layer writes.
        own: shape of one tensor that only this family has.
    """

    depth: int
    hidden: int
    mlp_hidden: int
    channels: int
    patch: int
    patch_width: int
    tokens: int
    predicted: int
    own: tuple[int, ...]

    @property
    def grid(self) -> int:
        """Tokens per side, if the grid is square."""
        return math.isqrt(self.tokens)

    @property
    def ratio(self) -> float:
        """Output channels per latent channel: 1, or 2 with sigma."""
        return self.predicted / (self.patch**2 * self.channels)


def sizes_from_tensors(tensors: Mapping[str, Tensor], what: str, own: str) -> Sizes:
    """Infer sizes from tensors, without checking them.

    Args:
        tensors: the tensors of the checkpoint.
        what: name of the family, for messages.
        own: name of the tensor that only this family has.

    Raises:
        ModelError: a tensor is missing or has an unexpected number of dimensions.
    """
    if "pos_embed" not in tensors:
        raise ModelError(
            f"the checkpoint looks like a {what} but has no position table (pos_embed), so the "
            "size of its images is unknown; export the folder of diffusers that it was made from, "
            "or save the model with its table"
        )
    try:
        hidden, channels, patch, patch_width = tensors["x_embedder.proj.weight"].shape
        _, tokens, _ = tensors["pos_embed"].shape
        return Sizes(
            depth=1 + max(int(m[1]) for m in map(_BLOCK.match, tensors) if m),
            hidden=hidden,
            mlp_hidden=tensors["blocks.0.mlp.fc1.weight"].shape[0],
            channels=channels,
            patch=patch,
            patch_width=patch_width,
            tokens=tokens,
            predicted=tensors["final_layer.linear.weight"].shape[0],
            own=tuple(tensors[own].shape),
        )
    except (KeyError, ValueError) as cause:
        raise ModelError(
            f"the checkpoint looks like a {what} but its sizes cannot be read: {cause}"
        ) from cause
