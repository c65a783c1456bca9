"""What a model looks like to every stage: sizes, units and the tensors they exchange."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta

from goc_deploy.modulation import ModulationRows

DIFFUSION_PREDICTIONS = ("eps", "v", "x0")
FLOW_PREDICTIONS = ("flow", "flow_to_noise")
PREDICTIONS = (*DIFFUSION_PREDICTIONS, *FLOW_PREDICTIONS)
DECODED_PIXELS = 64 * 64  # latent pixels of one launch of the decoder: one tile of the default size
MAX_TILES = 8
# What `goc_deploy.strict_json.convert` accepts where a file has such a field:
MAX_SIZE = 10**6
Size = Annotated[int, Meta(ge=1, le=MAX_SIZE)]
Count = Annotated[int, Meta(ge=0)]
SizeOrZero = Annotated[int, Meta(ge=0, le=MAX_SIZE)]


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Sizes of a Diffusion Transformer that draws classes or captions.

    Attributes:
        depth: number of blocks L.
        hidden: token width D.
        heads: attention heads; divides ``hidden``.
        mlp_hidden: inner width of the MLP branch.
        patch: patch side in latent pixels.
        grid: tokens per side, so that a sample is ``grid * patch`` latent pixels high and wide.
        channels: latent (or pixel) channels C.
        classes: number of labels; the null label is ``classes``. Of a model that draws captions, the number of captions
            that its engine directory keeps: label i is the i-th of them, the null label the unconditional one.
        learn_sigma: the model predicts 2*C channels: the prediction, then a variance that only ``ddpm`` samplers use.
        architecture: exporter that made the units.
        branches: the branches of each block, in execution order.
        prediction: what the first C channels predict: ``eps`` (the noise), ``v`` (velocity of a diffusion), ``x0`` (the clean
            sample), ``flow`` (velocity along the straight line from noise to the clean sample, told a time that rises from 0
            to 1, as SiT) or ``flow_to_noise`` (the opposite velocity, told a time that falls from 1000 to 0, as diffusers).
        frequency_shift: the timestep's 128 frequencies fall to 1/10000 over ``128 - frequency_shift`` intervals.
        mlp_norm_eps: what the layer norm before the MLP branch adds to the variance.
        guided_channels: classifier-free guidance acts on so many channels in the model's reference.
        caption_channels: width of a caption's embeddings, or 0 for a class-conditional model.
        caption_tokens: tokens of a caption; shorter ones are padded.
        told_size: height and width of the image in pixels, where the model is told them, or 0.
        block_embedders: every block embeds timesteps and labels with weights of its own, as a DiT that was trained in
            diffusers; the final layer takes what block 0 makes.
    """

    depth: Size
    hidden: Size
    heads: Size
    mlp_hidden: Size
    patch: Size
    grid: Size
    channels: Size
    classes: SizeOrZero
    learn_sigma: bool
    architecture: str = "dit"
    branches: Annotated[tuple[str, ...], Meta(min_length=1, max_length=3)] = ("attn", "mlp")
    prediction: str = "eps"
    frequency_shift: int = 0
    mlp_norm_eps: float = 1e-6
    guided_channels: SizeOrZero = 3
    caption_channels: SizeOrZero = 0
    caption_tokens: SizeOrZero = 0
    told_size: SizeOrZero = 0
    block_embedders: bool = False

    @property
    def tokens(self) -> int:
        """Tokens per sample T."""
        return self.grid**2

    @property
    def side(self) -> int:
        """Height and width of a sample in latent pixels."""
        return self.grid * self.patch

    @property
    def output_channels(self) -> int:
        """Channels that the model predicts."""
        return self.channels * (2 if self.learn_sigma else 1)

    @property
    def draws_captions(self) -> bool:
        """Whether captions take the place of labels."""
        return self.caption_channels > 0

    @property
    def units(self) -> int:
        """Number of units, blocks times branches; unit u is block ``u // len(branches)``."""
        return self.depth * len(self.branches)

    @property
    def modulation(self) -> ModulationRows:
        """The rows of the modulation table."""
        return ModulationRows(self.units)

    @property
    def unit_names(self) -> tuple[str, ...]:
        """``block_00_attn``, ``block_00_mlp``, ...: the units in the order in which a step runs them."""
        return tuple(
            f"block_{block:02d}_{branch}" for block in range(self.depth) for branch in self.branches
        )


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """What the decoder unit makes of latents.

    Attributes:
        channels: of the images.
        upscale: image pixels per latent pixel and side.
        tile: latent pixels per side that the graph takes; larger latents are decoded tile by tile.
        overlap: least latent pixels that neighbouring tiles share, over which they are blended.
    """

    channels: int
    upscale: Annotated[int, Meta(ge=1, le=10**4)]
    tile: Size
    overlap: Size


def tiles_at_once(spec: ModelSpec) -> int:
    """Most tiles that the decoder takes in one launch: as many latents as fit into ``DECODED_PIXELS``, which bounds its
    memory. A larger tile fills the processor by itself."""
    return max(1, min(MAX_TILES, DECODED_PIXELS // spec.side**2))


@dataclass(frozen=True, slots=True)
class TextSpec:
    """What the text encoder unit takes.

    Attributes:
        tokenizer: path of its ``tokenizer.json`` in the engine directory.
        vocabulary: tokens that it knows.
        eos: the token that ends a text.
        pad: the token behind it.
    """

    tokenizer: str
    vocabulary: Size
    eos: Count
    pad: Count
