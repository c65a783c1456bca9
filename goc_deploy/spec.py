"""The sizes of a model, its units, and the tensors that the stages exchange."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta

from goc_deploy.modulation import ModulationRows

DIFFUSION_PREDICTION_TYPES = ("eps", "v", "x0")
FLOW_PREDICTION_TYPES = ("flow", "flow_to_noise")
PREDICTION_TYPES = (*DIFFUSION_PREDICTION_TYPES, *FLOW_PREDICTION_TYPES)
DECODED_PIXELS = 64 * 64  # latent pixels of one decoder launch: one tile of the default size
MAX_TILES = 8
CACHED_FRAMES = 2  # that a causal convolution of kernel size 3 needs from the frames before
# The values that `goc_deploy.strict_json.convert` accepts for such a field of a file:
MAX_SIZE = 10**6
Size = Annotated[int, Meta(ge=1, le=MAX_SIZE)]
Count = Annotated[int, Meta(ge=0)]
SizeOrZero = Annotated[int, Meta(ge=0, le=MAX_SIZE)]


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Sizes of a class-conditional or text-conditional Diffusion Transformer.

    Attributes:
        depth: number of blocks L.
        hidden: token width D.
        heads: attention heads; divides ``hidden``.
        mlp_hidden: inner width of the MLP branch.
        patch: patch side in latent pixels.
        grid: tokens per side, so that a sample is ``grid * patch`` latent pixels high and wide.
        channels: latent (or pixel) channels C.
        choices: number of choices: a label is below it, and the null label is equal to it. A
            class-conditional model has this many classes. For a text-conditional model it is the
            number of stored captions: label i is the i-th of them, and the null label is the
            unconditional caption.
        learn_sigma: the model output has 2*C channels: the noise, velocity or clean sample, then a
            variance that only ``ddpm`` samplers use.
        architecture: name of the exporter that wrote the units.
        branches: the branches of each block, in execution order.
        prediction_type: prediction type, the meaning of the first C channels of the model output:
            ``eps`` (the noise), ``v`` (velocity of a diffusion), ``x0`` (the clean sample),
            ``flow`` or ``flow_to_noise``. A flow is the velocity along the straight line from noise
            to the clean sample, with a time that rises from 0 to 1, as in SiT. ``flow_to_noise`` is
            the opposite velocity, with a time that falls from 1000 to 0, as in diffusers.
        frequency_shift: the 128 frequencies of the timestep fall to 1/10000 over
            ``128 - frequency_shift`` intervals.
        mlp_norm_eps: epsilon of the layer norm before the MLP branch.
        guided_channels: number of leading channels that guidance acts on in the reference
            implementation.
        caption_channels: width of a caption's embeddings, or 0 for a class-conditional model.
        caption_tokens: tokens of a caption; shorter ones are padded.
        told_size: height and width of the image in pixels if they are inputs of the model, or 0.
        block_embedders: every block embeds timesteps and labels with weights of its own, as in a
            DiT that was trained in diffusers; the final layer uses the embedding of block 0.
    """

    depth: Size
    hidden: Size
    heads: Size
    mlp_hidden: Size
    patch: Size
    grid: Size
    channels: Size
    choices: SizeOrZero
    learn_sigma: bool
    architecture: str = "dit"
    branches: Annotated[tuple[str, ...], Meta(min_length=1, max_length=3)] = ("attn", "mlp")
    prediction_type: str = "eps"
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
        """Channels of the model output."""
        return self.channels * (2 if self.learn_sigma else 1)

    @property
    def text_conditional(self) -> bool:
        """Whether the model is text-conditional."""
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
        """``block_00_attn``, ``block_00_mlp``, ...: the units in execution order."""
        return tuple(
            f"block_{block:02d}_{branch}" for block in range(self.depth) for branch in self.branches
        )


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """The decoder unit, which turns latents into images.

    Attributes:
        channels: channels of the images.
        upscale: image pixels per latent pixel and side.
        tile: side of the graph's input in latent pixels; larger latents are decoded tile by tile.
        overlap: smallest number of latent pixels that neighbouring tiles share and are blended
            over.
    """

    channels: int
    upscale: Annotated[int, Meta(ge=1, le=10**4)]
    tile: Size
    overlap: Size


def tiles_at_once(spec: ModelSpec) -> int:
    """Largest number of tiles in one launch of the decoder.

    ``DECODED_PIXELS`` limits their latent pixels, and so the memory. One large tile keeps the
    processor busy by itself.
    """
    return max(1, min(MAX_TILES, DECODED_PIXELS // spec.side**2))


@dataclass(frozen=True, slots=True)
class TextSpec:
    """The inputs of the text encoder unit.

    Attributes:
        tokenizer: path of its ``tokenizer.json`` in the engine directory.
        vocabulary: number of tokens that it knows.
        eos: the token that ends a text.
        pad: the token that fills the places after it.
        lower_case: whether prompts are converted to lower case. If not, HTML entities are replaced
            and white space is collapsed, as in Wan's pipeline.
    """

    tokenizer: str
    vocabulary: Size
    eos: Count
    pad: Count
    lower_case: bool = True


@dataclass(frozen=True, slots=True)
class FrameCache:
    """The input frames that a causal convolution of a video decoder keeps.

    Attributes:
        channels: channels of its input.
        upscale: pixels of its input per latent pixel and side.
    """

    channels: Size
    upscale: Annotated[int, Meta(ge=1, le=64)]


@dataclass(frozen=True, slots=True)
class VideoDecoderSpec:
    """The unit ``video_decoder``, which turns latents into the frames of a video, one by one.

    A frame of latents becomes ``frames`` frames of the video, and the first one only one.

    Attributes:
        latent_channels: channels of the latents.
        channels: channels of a frame of the video.
        upscale: pixels of the video per latent pixel and side.
        frames: frames of the video per frame of latents after the first.
        caches: what the causal convolutions keep from one frame of latents to the next. The graph
            has them as inputs ``cache_0``, ``cache_1``, ... and as outputs ``kept_0``, ``kept_1``,
            ..., each (1, channels, `CACHED_FRAMES`, h*upscale, w*upscale) float32 for latents of
            h x w pixels.
    """

    latent_channels: Size
    channels: Size
    upscale: Annotated[int, Meta(ge=1, le=64)]
    frames: Annotated[int, Meta(ge=1, le=64)]
    caches: Annotated[tuple[FrameCache, ...], Meta(min_length=1, max_length=1000)]

    def cache_shape(self, cache: FrameCache, height: int, width: int) -> tuple[int, ...]:
        """Shape of a cache for latents of ``height`` x ``width`` pixels."""
        side = cache.upscale
        return (1, cache.channels, CACHED_FRAMES, height * side, width * side)
