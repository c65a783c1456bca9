"""Reading models with two streams: settings of diffusers, sizes from tensors, and the model."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby

from msgspec import Struct

from goc_deploy.blocks import MAX_BLOCKS, Blocks, Unit
from goc_deploy.errors import ModelError
from goc_deploy.exporters.folders import MAX_WIDTH, Setting
from goc_deploy.spec import ModelSpec

PATCH = 2
VALUES_OF_PATCH = PATCH**2  # of a channel
PIXELS_PER_LATENT = 8  # of the VAEs of the public models
DEPTHS = ("num_layers", "num_single_layers")  # the settings that count blocks


class JointConfig(Struct, frozen=True, kw_only=True):
    """The settings that transformers with two streams have in common.

    Attributes:
        num_attention_heads: heads.
        attention_head_dim: width of a head.
        in_channels: values of a token: those of a patch of the latents.
        out_channels: values or channels that are predicted, or None for ``in_channels``.
        joint_attention_dim: width of a caption's embeddings.
        num_layers: blocks with layers for each stream.
        axes_dims_rope: values of a head that the positions on each axis turn.
    """

    num_attention_heads: Setting
    attention_head_dim: Setting
    in_channels: Setting
    out_channels: int | None = None
    joint_attention_dim: Setting
    num_layers: Setting
    axes_dims_rope: tuple[Setting, ...]

    def check(self, where: str) -> None:
        """Check that the sizes fit together.

        Raises:
            ModelError: they do not, or are too large; the message names them.
        """
        heads, head, axes = (
            self.num_attention_heads,
            self.attention_head_dim,
            self.axes_dims_rope,
        )
        if self.in_channels % VALUES_OF_PATCH:
            raise ModelError(
                f"{where}: in_channels is {self.in_channels}, expected a multiple of "
                f"{VALUES_OF_PATCH}, the pixels of a patch"
            )
        if sum(axes) != head or any(width % 2 for width in axes) or heads * head > MAX_WIDTH:
            raise ModelError(
                f"{where}: axes_dims_rope is {list(axes)}, attention_head_dim {head} and "
                f"num_attention_heads {heads}; the first must be even numbers whose sum is the "
                f"second, and all heads together at most {MAX_WIDTH} wide"
            )
        depths = {name: getattr(self, name) for name in DEPTHS if hasattr(self, name)}
        if sum(depths.values()) > MAX_BLOCKS:
            counts = " and ".join(f"{name} is {count}" for name, count in depths.items())
            raise ModelError(f"{where}: {counts}, at most {MAX_BLOCKS} blocks are supported")


@contextmanager
def reading_sizes(family: str) -> Iterator[None]:
    """Report tensors that are missing or have other dimensions, while sizes are read from them.

    Raises:
        ModelError: a KeyError, IndexError or ValueError was raised.
    """
    try:
        yield
    except (KeyError, IndexError, ValueError) as cause:
        raise ModelError(
            f"the checkpoint looks like a {family} but its sizes cannot be read: {cause}"
        ) from cause


def count_blocks(names: Collection[str], run: str = "transformer_blocks") -> int:
    """The number of blocks whose tensors are named ``RUN.NUMBER.``, at least one."""
    of_block = re.compile(re.escape(run) + r"\.(\d{1,4})\.")
    return 1 + max((int(match[1]) for match in map(of_block.match, names) if match), default=0)


def check_heads(hidden: int, head: int, heads: int | None, *, known: bool, supported: str) -> None:
    """Check heads whose axes a file does not have.

    Args:
        hidden: width of the model.
        head: width of a head.
        heads: the number of heads that the user requests, or None.
        known: whether the axes of such a head are known.
        supported: the widths of the heads whose axes are known, for the message.

    Raises:
        ModelError: the axes are not known, or the number of heads is another one.
    """
    if not known or hidden % head or heads not in (None, hidden // head):
        raise ModelError(
            f"the width is {hidden}, with heads of {head}; heads of {supported} are supported in a "
            "file, because it does not have their axes_dims_rope, and `num_heads` must be their "
            "number: leave it out, or give the folder that diffusers saved"
        )


def image_spec(
    architecture: str,
    blocks: Iterable[tuple[Unit, ...]],
    *,
    heads: int,
    head: int,
    mlp_hidden: int,
    channels: int,
    grid: tuple[int, int],
) -> ModelSpec:
    """A model that predicts the flow of images from clean samples to noise.

    Args:
        architecture: name of the family.
        blocks: the units of each block.
        heads: attention heads.
        head: width of a head.
        mlp_hidden: inner width of the MLPs.
        channels: channels of the latents.
        grid: tokens of the usual sample. Engines accept any size.
    """
    runs = tuple(Blocks(len(list(run)), units) for units, run in groupby(blocks))
    branches = (unit.branch for run in runs for unit in run.units)
    return ModelSpec(
        depth=sum(run.count for run in runs),
        hidden=heads * head,
        heads=heads,
        mlp_hidden=mlp_hidden,
        patch=PATCH,
        grid=grid,
        max_grid=grid,
        channels=channels,
        guided_channels=channels,
        choices=0,
        learn_sigma=False,
        architecture=architecture,
        branches=tuple(dict.fromkeys(branches)),
        blocks=runs,
        prediction_type="flow_to_noise",
        vae_scale=PIXELS_PER_LATENT,
    )
