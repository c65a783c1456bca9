"""Latents to pixels with the decoder, in tiles if the latents are larger than the graph's tile.

Adjacent tiles overlap. Every pixel is the mean of the tiles that contain it, weighted by the
distance from their edges, so that no seam is visible. Apart from the images themselves, memory does
not grow with the number of tiles or images.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, product

import numpy as np

from goc_deploy.cancellation import CallLimits
from goc_deploy.protocols import Backend, Buffer, Engine, Run
from goc_deploy.runtime.images import pixels_to_uint8
from goc_deploy.spec import DecoderSpec, ModelSpec, tiles_at_once


def tile_starts(side: int, tile: int, overlap: int) -> tuple[int, ...]:
    """The starts of the tiles along a side.

    They are evenly spaced, with the smallest number of tiles that overlap by at least ``overlap``.
    For ``side`` 128, ``tile`` 64 and ``overlap`` 16, the starts are 0, 32 and 64.
    """
    if side <= tile:
        return (0,)
    count = math.ceil((side - overlap) / (tile - overlap))
    return tuple(round(i * (side - tile) / (count - 1)) for i in range(count))


def ramp(tile: int, overlap: int, *, first: bool, last: bool) -> np.ndarray:
    """Weights (tile,) along a tile: 1 in the middle, decreasing over ``overlap`` at inner edges."""
    rising = (np.arange(tile) + 0.5) / overlap
    weights = np.ones(tile) if first else np.minimum(1.0, rising)
    return weights if last else np.minimum(weights, rising[::-1])


def ramps(starts: Sequence[int], tile: int, overlap: int, scale: int) -> list[np.ndarray]:
    """The weights (tile * scale,) of the tiles along a side; see `tile_starts`."""
    last = len(starts) - 1
    return [
        ramp(tile * scale, overlap * scale, first=i == 0, last=i == last) for i in range(last + 1)
    ]


class LatentDecoder:
    """Runs the decoder on its own stream, several tiles at a time. Thread-safe.

    Latents and pixels pass through the host, because the latents are downloaded anyway and are
    small compared with the pixels.

    Args:
        engine: engine of the decoder.
        backend: owns the buffers.
        decoder: tiles and scale.
        spec: sizes of the model.
    """

    def __init__(
        self, engine: Engine, backend: Backend, decoder: DecoderSpec, spec: ModelSpec
    ) -> None:
        tile, scale = decoder.tile, decoder.upscale
        self._engine, self._decoder = engine, decoder
        self._most, self._stream = tiles_at_once(spec), backend.stream()
        self._input = backend.allocate((self._most, spec.channels, tile, tile), "float32")
        self._output = backend.allocate(
            (self._most, decoder.channels, tile * scale, tile * scale), "float32"
        )
        self._bound: dict[int, tuple[Buffer, Buffer, Run]] = {}  # by the number of tiles
        self._bind(1)

    def images(self, latents: np.ndarray, limits: CallLimits | None = None) -> np.ndarray:
        """Decode images.

        Args:
            latents: (N, C, H, W) float32, or (N, C, F, H, W) of videos, whose frames are decoded
                one by one.
            limits: checked before every launch.

        Returns:
            (N, H*upscale, W*upscale, channels) uint8, or (N, F, ...) of videos.

        Raises:
            CancelledError, DeadlineError: because of ``limits``.
        """
        frames = np.moveaxis(latents, 1, -3)  # (N, C, H, W), or (N, F, C, H, W)
        *count, channels, height, width = frames.shape
        flat = frames.reshape(-1, channels, height, width)
        images = np.stack([pixels_to_uint8(pixels) for pixels in self.pixels(flat, limits)])
        return images.reshape(*count, *images.shape[1:])

    def pixels(self, latents: np.ndarray, limits: CallLimits | None = None) -> Iterator[np.ndarray]:
        """Decode latents (N, C, H, W) float32 image by image; see `images`.

        If a side is shorter than a tile, its last pixels are repeated up to the size of one.

        Yields:
            (channels, H*upscale, W*upscale) float32, about -1..1.
        """
        tile, overlap = self._decoder.tile, self._decoder.overlap
        upscale, missing = self._decoder.upscale, [max(0, tile - s) for s in latents.shape[-2:]]
        if any(missing):
            lengths = ((0, 0), (0, 0), *((0, count) for count in missing))
            for whole in self.pixels(np.pad(latents, lengths, "edge"), limits):
                height, width = (side * upscale for side in latents.shape[-2:])
                yield whole[:, :height, :width]
            return
        height, width = latents.shape[-2:]
        rows, columns = (tile_starts(side, tile, overlap) for side in (height, width))
        places = list(product(rows, columns))
        tiles = (image[:, y : y + tile, x : x + tile] for image in latents for y, x in places)
        decoded = self._decoded(tiles, limits)
        for _ in latents:
            yield self._blended(rows, columns, (height, width), islice(decoded, len(places)))

    def _blended(
        self,
        rows: Sequence[int],
        columns: Sequence[int],
        size: tuple[int, int],
        tiles: Iterator[np.ndarray],
    ) -> np.ndarray:
        """Blend the tiles of an image; ``rows`` and ``columns`` are where they start."""
        if len(rows) * len(columns) == 1:
            return next(tiles)
        tile, scale = self._decoder.tile, self._decoder.upscale
        height, width = size
        total = np.zeros((self._decoder.channels, height * scale, width * scale))
        weight = np.zeros((height * scale, width * scale))
        down_and_across = (
            ramps(starts, tile, self._decoder.overlap, scale) for starts in (rows, columns)
        )
        shares = product(*down_and_across)
        for (y, x), (down, across), pixels in zip(
            product(rows, columns), shares, tiles, strict=True
        ):
            there = np.s_[y * scale : (y + tile) * scale, x * scale : (x + tile) * scale]
            share = np.outer(down, across)
            total[:, *there] += share * pixels
            weight[there] += share
        return (total / weight).astype(np.float32)

    def _decoded(
        self, tiles: Iterable[np.ndarray], limits: CallLimits | None
    ) -> Iterator[np.ndarray]:
        """The pixels of tiles, in order."""
        waiting = iter(tiles)
        while together := list(islice(waiting, self._most)):
            if limits is not None:
                limits.check()
            with self._stream.held():  # which also protects the buffers
                latents, pixels, run = self._bind(len(together))
                self._stream.upload(np.stack(together), latents)
                self._stream.wait()  # some backends run engines on their own streams
                run()
                decoded = self._stream.download(pixels)
            yield from decoded

    def _bind(self, tiles: int) -> tuple[Buffer, Buffer, Run]:
        if tiles not in self._bound:
            latents, pixels = (b.view(tiles, *b.shape[1:]) for b in (self._input, self._output))
            run = self._engine.bind({"latents": latents}, {"pixels": pixels}, self._stream)
            self._bound[tiles] = (latents, pixels, run)
        return self._bound[tiles]
