"""Latents to the frames of a video, one frame of latents at a time.

What the causal convolutions keep between frames stays on the device, so that its memory does not
grow with the length of the video. Frames that are larger than a tile are decoded in tiles, each for
the whole video, so that it does not grow with their size either. Tiles are blended as those of
images are, see `goc_deploy.runtime.decoder`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from goc_deploy.cancellation import CallLimits
from goc_deploy.errors import UsageError
from goc_deploy.protocols import Backend, Buffer, Engine, Run
from goc_deploy.runtime.decoder import ramps, tile_starts
from goc_deploy.runtime.images import pixels_to_uint8
from goc_deploy.spec import VideoDecoderSpec

MAX_SIZES = 4  # sizes whose launches are kept


@dataclass(frozen=True, slots=True)
class _Bound:
    """The launches for one size: ``runs[i % 2]`` decodes frame i, frame 0 from ``caches``."""

    latents: Buffer
    pixels: Buffer
    caches: Sequence[Buffer]
    runs: Sequence[Run]


class VideoDecoder:
    """Runs the decoder on its own stream. Thread-safe, but decodes one video at a time.

    Two sets of buffers hold what the convolutions keep: a launch reads one and writes the other.

    Args:
        engine: engine of the graph ``video_decoder``.
        backend: owns the buffers.
        decoder: sizes of the decoder.
        largest: height and width of the largest latents; the buffers are allocated for them, or for
            a tile if that is smaller.
    """

    def __init__(
        self, engine: Engine, backend: Backend, decoder: VideoDecoderSpec, largest: tuple[int, int]
    ) -> None:
        self._engine, self._decoder, self._most = engine, decoder, largest[0] * largest[1]
        if decoder.tile and self._most > decoder.tile**2:
            largest = (decoder.tile, decoder.tile)
        self._pixels_of_a_launch = largest[0] * largest[1]
        self._stream = backend.stream()
        self._first = backend.allocate((1,), "float32")
        self._latents = backend.allocate((1, decoder.latent_channels, 1, *largest), "float32")
        self._pixels = backend.allocate(self._pixel_shape(*largest), "float32")
        self._caches = tuple(
            tuple(
                backend.allocate(decoder.cache_shape(cache, *largest), "float32")
                for cache in decoder.caches
            )
            for _ in range(2)
        )
        self._bound: dict[tuple[int, int], _Bound] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        buffers = (self._first, self._latents, self._pixels, *sum(self._caches, ()))
        return sum(buffer.nbytes for buffer in buffers)

    def frames_of(self, latent_frames: int) -> int:
        """The number of frames of a video with ``latent_frames`` frames of latents."""
        return 1 + (latent_frames - 1) * self._decoder.frames

    def images(self, latents: np.ndarray, limits: CallLimits | None = None) -> np.ndarray:
        """Decode videos.

        Args:
            latents: (N, C, F, H, W) float32.
            limits: checked before every launch.

        Returns:
            (N, `frames_of` (F), H*upscale, W*upscale, channels) uint8.

        Raises:
            CancelledError, DeadlineError: because of ``limits``.
            UsageError: the latents do not fit the decoder.
        """
        count, _, frames, height, width = self._checked(latents).shape
        side = self._decoder.upscale
        shape = (count, self.frames_of(frames), height * side, width * side, self._decoder.channels)
        videos = np.empty(shape, np.uint8)
        for video, of_video in zip(videos, latents, strict=True):
            if max(height, width) > (self._decoder.tile or max(height, width)):
                self._blend(of_video, video, limits)
                continue
            start = 0
            for pixels in self.pixels(of_video, limits):
                video[start : start + len(pixels)] = pixels_to_uint8(pixels)
                start += len(pixels)
        return videos

    def _blend(self, latents: np.ndarray, video: np.ndarray, limits: CallLimits | None) -> None:
        """Decode the tiles of a video, and blend them.

        Args:
            latents: (C, F, H, W) float32.
            video: (frames, H*upscale, W*upscale, channels) uint8, which is filled.
            limits: as in `images`.
        """
        scale, overlap = self._decoder.upscale, self._decoder.overlap
        sides = latents.shape[2:]
        tiles = [min(side, self._decoder.tile) for side in sides]
        starts = [tile_starts(side, tile, overlap) for side, tile in zip(sides, tiles, strict=True)]
        down, across = (
            _shares(along, tile, overlap, scale, side)
            for along, tile, side in zip(starts, tiles, sides, strict=True)
        )
        total = np.zeros((len(video), self._decoder.channels, *video.shape[1:3]), np.float32)
        for (i, y), (j, x) in product(*map(enumerate, starts)):
            share = np.outer(down[i], across[j]).astype(np.float32)
            there = np.s_[y * scale :, x * scale :]
            of_tile, start = latents[:, :, y : y + tiles[0], x : x + tiles[1]], 0
            for pixels in self.pixels(of_tile, limits):
                target = total[start : start + len(pixels), :, *there]
                target[:, :, : share.shape[0], : share.shape[1]] += share * pixels
                start += len(pixels)
        for frame, pixels in zip(video, total, strict=True):
            frame[...] = pixels_to_uint8(pixels)

    def pixels(self, latents: np.ndarray, limits: CallLimits | None = None) -> Iterator[np.ndarray]:
        """Decode the latents (C, F, H, W) float32 of one video or tile in one piece; see `images`.

        Other threads wait until the iterator has ended or was closed.

        Yields:
            For each frame of latents, (1 or ``frames``, channels, H*upscale, W*upscale) float32 in
            -1..1.
        """
        _, frames, height, width = self._checked(latents[None])[0].shape
        assert height * width <= self._pixels_of_a_launch
        with self._stream.held():
            bound = self._bind(height, width)
            for cache in bound.caches:
                self._stream.upload(np.zeros(cache.shape, np.float32), cache)
            for frame in range(frames):
                if limits is not None:
                    limits.check()
                self._stream.upload(np.full(1, frame == 0, np.float32), self._first)
                of_frame = np.ascontiguousarray(latents[None, :, frame : frame + 1])
                self._stream.upload(of_frame, bound.latents)
                self._stream.wait()  # some backends run engines on their own streams
                bound.runs[frame % 2]()
                decoded = self._stream.download(bound.pixels)[0]  # (channels, frames, H, W)
                yield np.moveaxis(decoded[:, -1:] if frame == 0 else decoded, 1, 0)

    def _checked(self, latents: np.ndarray) -> np.ndarray:
        channels = self._decoder.latent_channels
        if latents.ndim != 5 or latents.shape[1] != channels or 0 in latents.shape:
            raise UsageError(
                f"latents of shape {latents.shape} are not (N, {channels}, F, H, W), which the "
                "video decoder takes"
            )
        if latents.shape[3] * latents.shape[4] > self._most:
            raise UsageError(
                f"latents of {latents.shape[3]} x {latents.shape[4]} pixels are larger than the "
                f"{self._most} pixels that the video decoder has memory for"
            )
        return latents

    def _pixel_shape(self, height: int, width: int) -> tuple[int, ...]:
        side = self._decoder.upscale
        return (1, self._decoder.channels, self._decoder.frames, height * side, width * side)

    def _bind(self, height: int, width: int) -> _Bound:
        size = (height, width)
        if size not in self._bound:
            if len(self._bound) == MAX_SIZES:
                del self._bound[next(iter(self._bound))]
            self._bound[size] = self._new_bound(height, width)
        return self._bound[size]

    def _new_bound(self, height: int, width: int) -> _Bound:
        channels = self._decoder.latent_channels
        latents = self._latents.view(1, channels, 1, height, width)
        pixels = self._pixels.view(*self._pixel_shape(height, width))
        caches = [
            [
                buffer.view(*self._decoder.cache_shape(cache, height, width))
                for buffer, cache in zip(half, self._decoder.caches, strict=True)
            ]
            for half in self._caches
        ]
        runs = []
        for before, after in (caches, caches[::-1]):
            inputs = {"latents": latents, "first": self._first}
            inputs |= {f"cache_{i}": cache for i, cache in enumerate(before)}
            outputs = {f"kept_{i}": cache for i, cache in enumerate(after)}
            runs.append(self._engine.bind(inputs, {"pixels": pixels, **outputs}, self._stream))
        return _Bound(latents, pixels, caches[0], runs)


def _shares(
    starts: Sequence[int], tile: int, overlap: int, scale: int, side: int
) -> list[np.ndarray]:
    """The weights (tile * scale,) of the tiles along a side, which add up to 1 everywhere."""
    weights = ramps(starts, tile, overlap, scale)
    places = [slice(start * scale, (start + tile) * scale) for start in starts]
    total = np.zeros(side * scale)
    for place, weight in zip(places, weights, strict=True):
        total[place] += weight
    return [weight / total[place] for place, weight in zip(places, weights, strict=True)]
