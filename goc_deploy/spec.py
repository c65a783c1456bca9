"""The sizes of a model, its units, and the tensors that the stages exchange."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from typing import Annotated, Literal

from msgspec import Meta

from goc_deploy.blocks import (
    ALL_STREAMS,
    MAX_BLOCKS,
    Blocks,
    FeaturePlace,
    TokenStream,
    Unit,
    UnitPlace,
    place_features,
    unit_places,
)
from goc_deploy.modulation import SHIFT_AND_SCALE, ModulationRows

DIFFUSION_PREDICTION_TYPES = ("eps", "v", "x0")
FLOW_PREDICTION_TYPES = ("flow", "flow_to_noise")
PREDICTION_TYPES = (*DIFFUSION_PREDICTION_TYPES, *FLOW_PREDICTION_TYPES)
DECODED_PIXELS = 64 * 64  # latent pixels of one decoder launch: one tile of the default size
MAX_TILES = 8
SECOND_SET = "second_"  # before the names of the graphs with the second set of weights
LONGEST_SIDE = 2  # times a side of the largest sample, for samples of no more tokens
MAX_REFERENCES = 16
CACHED_FRAMES = 2  # that a causal convolution of kernel size 3 needs from the frames before
# The values that `goc_deploy.strict_json.convert` accepts for such a field of a file:
MAX_SIZE = 10**6
Size = Annotated[int, Meta(ge=1, le=MAX_SIZE)]
Axes = Annotated[tuple[Size, ...], Meta(min_length=2, max_length=3)]
Count = Annotated[int, Meta(ge=0)]
SizeOrZero = Annotated[int, Meta(ge=0, le=MAX_SIZE)]


@dataclass(frozen=True, slots=True)
class Positions:
    """The tensors that tell a model where its tokens are.

    Attributes:
        kind: ``sine``: a table that the ``embed`` graph adds to the tokens. ``rotary``: angles by
            which units turn queries and keys.
        base: ``sine``: tokens per side of a square sample. The tokens of any other size are spread
            over the same range.
        stretch: ``sine``: number of tokens within a distance of 1, for a sample of ``base``.
        table: ``sine``: tokens per side of a square table of which every sample shows the middle,
            so that its tokens are as far apart at every size; 0 if there is no such table, and
            samples are spread over the range of ``base``.
        origin: ``sine``: position of the first token of that table.
        widths: ``rotary``: values of a head that each axis turns; even, and their sum is the width
            of a head. Leading axes that a sample does not have turn by nothing.
        theta: ``rotary``: base of the frequencies.
        centered: ``rotary``: whether rows and columns are counted from the middle of the sample.
        turns_text: ``rotary``: whether tokens of the text are turned too. They follow the last
            position of the sample, on all axes alike.
        text_axis: ``rotary``: whether the last width belongs to an axis of its own. Tokens of the
            text are counted along it, and have position 0 along the others. Those of the sample
            have position 0 along it.
    """

    kind: Literal["sine", "rotary"]
    base: Annotated[int, Meta(ge=0)] = 0
    stretch: Annotated[float, Meta(gt=0)] = 1.0
    table: SizeOrZero = 0
    origin: float = 0.0
    widths: tuple[int, ...] = ()
    theta: float = 10_000.0
    centered: bool = False
    turns_text: bool = False
    text_axis: bool = False


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Sizes of a class-conditional or text-conditional Diffusion Transformer.

    Attributes:
        depth: number of blocks L.
        hidden: token width D.
        heads: attention heads; divides ``hidden``.
        mlp_hidden: inner width of the MLP branch.
        patch: patch side in latent pixels.
        grid: tokens along each axis of a sample: (rows, columns) of an image, or (frames, rows,
            columns) of a video; one number for a square image.
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
        positions: the position tensors that graphs have as inputs, or None if the table of the only
            size is a weight of the ``embed`` graph.
        max_references: the largest number of reference images of a sample, each of at most as many
            tokens as the largest sample; 0 if the model reads none. Their tokens are the stream
            ``reference``.
        references: tokens along each axis of each reference image; empty for one of the size of the
            sample.
        max_grid: the largest sample that the engines accept, in tokens along each axis; None if
            they accept samples of size ``grid`` only.
        vae_scale: pixels per latent pixel and side of the VAE of the training, or 1.
        vae_frames: frames of a video per frame of latents after the first, or 1.
        rows: for each branch, the rows of the modulation table that its units read in addition to
            their gates; empty if each reads a shift and a scale.
        blocks: the units of the blocks if they differ or change the stream of the text; ``depth``
            is then the number of all blocks and ``branches`` are the names of their branches. Empty
            if every block has ``branches``, each with one feature of the image.
        pooled_channels: width of the pooled embedding of a caption that the conditioning reads, or
            0.
        embedded_guidance: whether the conditioning reads a guidance scale.
        distilled: whether the model was trained to draw without guidance.
        qk_norm: whether attention normalises queries and keys, in families of which some models do.
        guidance_norm: what guidance keeps of the conditional output: ``none``, or the norm of each
            ``token``, its C * patch * patch values.
        token_multiple: a sample must have a multiple of this many tokens, and captions too.
        skip_guidance_layers: the blocks that skip-layer guidance leaves out, in ascending order;
            empty if the engine directory has no rows for it.
        boundary: share of the 1000 training timesteps below which a second set of weights computes
            the steps; 0 if the model has one set. Wan 2.2 A14B has two.
    """

    depth: Size
    hidden: Size
    heads: Size
    mlp_hidden: Size
    patch: Size
    grid: Size | Axes
    channels: Size
    choices: SizeOrZero
    learn_sigma: bool
    architecture: str = "dit"
    branches: Annotated[tuple[str, ...], Meta(min_length=1, max_length=6)] = ("attn", "mlp")
    prediction_type: str = "eps"
    frequency_shift: int = 0
    mlp_norm_eps: float = 1e-6
    guided_channels: SizeOrZero = 3
    caption_channels: SizeOrZero = 0
    caption_tokens: SizeOrZero = 0
    told_size: SizeOrZero = 0
    block_embedders: bool = False
    positions: Positions | None = None
    max_grid: Axes | None = None
    vae_scale: Size = 1
    vae_frames: Size = 1
    rows: Annotated[tuple[tuple[str, ...], ...], Meta(max_length=3)] = ()
    blocks: Annotated[tuple[Blocks, ...], Meta(max_length=MAX_BLOCKS)] = ()
    pooled_channels: SizeOrZero = 0
    embedded_guidance: bool = False
    distilled: bool = False
    qk_norm: bool = False
    guidance_norm: Literal["none", "token"] = "none"
    token_multiple: Size = 1
    skip_guidance_layers: Annotated[tuple[Count, ...], Meta(max_length=MAX_BLOCKS)] = ()
    boundary: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    max_references: Annotated[int, Meta(ge=0, le=MAX_REFERENCES)] = 0
    references: Annotated[tuple[Axes, ...], Meta(max_length=MAX_REFERENCES)] = ()

    @property
    def axes(self) -> tuple[int, ...]:
        """Tokens along each axis of a sample: (rows, columns), after the frames of a video."""
        return (self.grid, self.grid) if isinstance(self.grid, int) else self.grid

    @property
    def tokens(self) -> int:
        """Tokens per sample T."""
        return math.prod(self.axes)

    @property
    def sample(self) -> tuple[int, ...]:
        """Frames of a video, height and width of a sample in latent pixels."""
        *frames, rows, columns = self.axes
        return (*frames, rows * self.patch, columns * self.patch)

    @property
    def latents(self) -> tuple[int, ...]:
        """Shape of the latents of a sample: (C, H, W), or (C, F, H, W) of a video."""
        return (self.channels, *self.sample)

    @property
    def prediction(self) -> tuple[int, ...]:
        """Shape of the model output of a sample: (C_out, H, W), or (C_out, F, H, W)."""
        return (self.output_channels, *self.sample)

    @property
    def side(self) -> int:
        """The shorter side of a sample in latent pixels."""
        return min(self.sample[-2:])

    @property
    def video(self) -> bool:
        """Whether a sample has frames."""
        return len(self.axes) == 3

    @property
    def any_size(self) -> bool:
        """Whether the size of a sample is chosen at run time."""
        return self.max_grid is not None

    def at(self, grid: tuple[int, ...], references: tuple[tuple[int, ...], ...] = ()) -> ModelSpec:
        """The same model for samples of another size; itself if the size is the same.

        Args:
            grid: tokens along each axis of a sample.
            references: `references` of the sample.
        """
        if (grid, references) == (self.axes, self.references):
            return self
        return replace(self, grid=grid, references=references)

    @property
    def largest(self) -> ModelSpec:
        """The same model for the largest samples, and as many references of their size."""
        if self.max_grid is None:
            return self
        return self.at(self.max_grid, (self.max_grid,) * self.max_references)

    @property
    def reference_axes(self) -> tuple[tuple[int, ...], ...]:
        """Tokens along each axis of each reference image."""
        return self.references or ((self.axes,) if self.max_references else ())

    @property
    def patch_values(self) -> int:
        """Latent values of a token's patch."""
        return self.channels * self.patch**2

    def axes_of(self, latents: tuple[int, ...]) -> tuple[int, ...]:
        """Tokens along each axis of latents (C, H, W), or (C, F, H, W) of a video."""
        _, *frames, height, width = latents
        return (*frames, height // self.patch, width // self.patch)

    def in_patches(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """A view of images by patches: (n, C, ..., h, p, w, p) for a shape (n, C, ..., H, W)."""
        *rest, height, width = shape
        patch = self.patch
        return (*rest, height // patch, patch, width // patch, patch)

    @property
    def output_channels(self) -> int:
        """Channels of the model output."""
        return self.channels * (2 if self.learn_sigma else 1)

    @property
    def rows_per_image(self) -> int:
        """Rows of an image in the largest batch: conditional, unconditional, and with skips."""
        return 3 if self.skip_guidance_layers else 2

    @property
    def skipped_gates(self) -> tuple[int, ...]:
        """The rows of the modulation table that are the gates of `skip_guidance_layers`."""
        skipped, places, rows = self.skip_guidance_layers, self.unit_places, self.modulation
        return tuple(
            rows.gate(feature)
            for feature, place in enumerate(self.features)
            if places[place.unit].block in skipped
        )

    @property
    def text_conditional(self) -> bool:
        """Whether the model is text-conditional."""
        return self.caption_channels > 0

    @property
    def one_modulation(self) -> bool:
        """Whether all images have the same modulation: it reads neither labels nor captions."""
        return self.text_conditional and not self.pooled_channels

    @property
    def block_units(self) -> tuple[tuple[Unit, ...], ...]:
        """The units of each block."""
        return _block_units(self)

    @property
    def branches_of_blocks(self) -> tuple[tuple[str, ...], ...]:
        """The branches of each block."""
        return tuple(tuple(unit.branch for unit in units) for units in self.block_units)

    @property
    def declared_units(self) -> tuple[Unit, ...]:
        """The declaration of each unit, in execution order."""
        return tuple(chain.from_iterable(self.block_units))

    @property
    def units(self) -> int:
        """Number of units."""
        return sum(map(len, self.block_units))

    @property
    def unit_places(self) -> tuple[UnitPlace, ...]:
        """The block and branch of each unit."""
        return unit_places(self.branches_of_blocks)

    @property
    def features(self) -> tuple[FeaturePlace, ...]:
        """The features of all units, stream by stream, those of the image first."""
        return _features(self)

    @property
    def streams(self) -> tuple[TokenStream, ...]:
        """The streams that units read, in the order of features."""
        read = set(chain.from_iterable(unit.reads for unit in self.declared_units))
        return tuple(stream for stream in ALL_STREAMS if stream in read)

    @property
    def has_text_stream(self) -> bool:
        """Whether the tokens of the caption are a stream that units read and change."""
        return "text" in self.streams

    def tokens_of(self, stream: TokenStream) -> int:
        """Tokens per sample of a stream."""
        if stream == "reference":
            return sum(map(math.prod, self.reference_axes))
        return self.tokens if stream == "image" else self.caption_tokens

    @property
    def modulation(self) -> ModulationRows:
        """The rows of the modulation table."""
        gates = tuple((place.unit, place.feature.gate) for place in self.features)
        return ModulationRows(gates, tuple(unit.rows for unit in self.declared_units))

    @property
    def unit_names(self) -> tuple[str, ...]:
        """``block_00_attn``, ``block_00_mlp``, ...: the units in execution order."""
        return tuple(f"block_{place.block:02d}_{place.branch}" for place in self.unit_places)


@lru_cache(maxsize=64)
def _block_units(spec: ModelSpec) -> tuple[tuple[Unit, ...], ...]:
    """See `ModelSpec.block_units`."""
    if not spec.blocks:
        rows = spec.rows or (SHIFT_AND_SCALE,) * len(spec.branches)
        units = tuple(map(Unit, spec.branches, rows))
        return (units,) * spec.depth
    return tuple(chain.from_iterable((run.units,) * run.count for run in spec.blocks))


@lru_cache(maxsize=64)
def _features(spec: ModelSpec) -> tuple[FeaturePlace, ...]:
    """See `ModelSpec.features`."""
    return place_features(spec.declared_units)


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
    return max(1, min(MAX_TILES, DECODED_PIXELS // math.prod(spec.sample)))


TEXT_ENCODER = "text_encoder"  # name of the unit of a T5


def clip_unit(index: int) -> str:
    """The name of the unit of a CLIP: ``clip_1``, ``clip_2``."""
    return f"clip_{index + 1}"


@dataclass(frozen=True, slots=True)
class TextSpec:
    """The inputs of the unit ``text_encoder``, a T5.

    Beside units of CLIP, it reads prompts as they are, and padding like text, as in the pipelines
    of Stable Diffusion 3 and FLUX.

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
class ClipSpec:
    """The inputs and outputs of a unit ``clip_1`` or ``clip_2``, the text half of a CLIP.

    Attributes:
        tokenizer: path of its ``tokenizer.json`` in the engine directory.
        vocabulary: number of tokens that it knows.
        eos: the token that ends a text.
        pad: the token that fills the places after it.
        tokens: number of tokens of a prompt with its padding.
        pooled: width of the pooled embedding of a prompt, part of that of the caption.
        width: width of the embeddings of the tokens. Those of several CLIPs are joined to tokens
            of the caption, padded with zeros to its width, which precede those of the T5. 0 if only
            the pooled embedding is used.
    """

    tokenizer: str
    vocabulary: Size
    eos: Count
    pad: Count
    tokens: Size
    pooled: Size
    width: SizeOrZero = 0


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
        tile: side of a tile in latent pixels; larger latents are decoded in tiles. 0 decodes frames
            of any size in one piece.
        overlap: smallest number of latent pixels that neighbouring tiles share and are blended
            over.
    """

    latent_channels: Size
    channels: Size
    upscale: Annotated[int, Meta(ge=1, le=64)]
    frames: Annotated[int, Meta(ge=1, le=64)]
    caches: Annotated[tuple[FrameCache, ...], Meta(min_length=1, max_length=1000)]
    tile: SizeOrZero = 0
    overlap: SizeOrZero = 0

    def cache_shape(self, cache: FrameCache, height: int, width: int) -> tuple[int, ...]:
        """Shape of a cache for latents of ``height`` x ``width`` pixels."""
        side = cache.upscale
        return (1, cache.channels, CACHED_FRAMES, height * side, width * side)
