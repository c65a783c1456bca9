"""Latents to pixels by the decoder unit, tile by tile where they are larger than the tile that the graph takes.

Neighbouring tiles overlap. Every pixel is the mean of the tiles that hold it, weighted by how far it lies from their
edges, so that no seam shows. Memory does not grow with the number of tiles or images, but for the images themselves.
"""

from __future__ import annotations

import math
import threading
from itertools import product

import numpy as np

from goc_deploy.protocols import Backend, Engine
from goc_deploy.runtime.images import pixels_to_uint8
from goc_deploy.spec import DecoderSpec


def tile_starts(side: int, tile: int, overlap: int) -> tuple[int, ...]:
    """Where tiles start along a side: evenly spread, as few as share ``overlap`` at least.

    ``side`` 128, ``tile`` 64, ``overlap`` 16 gives 0, 32, 64.
    """
    if side <= tile:
        return (0,)
    count = math.ceil((side - overlap) / (tile - overlap))
    return tuple(round(i * (side - tile) / (count - 1)) for i in range(count))


def ramp(tile: int, overlap: int, *, first: bool, last: bool) -> np.ndarray:
    """Weights along a tile: 1 in its middle, falling over ``overlap`` towards an edge that has a neighbour."""
    rising = (np.arange(tile) + 0.5) / overlap
    weights = np.ones(tile) if first else np.minimum(1.0, rising)
    return weights if last else np.minimum(weights, rising[::-1])


class LatentDecoder:
    """Runs the decoder unit. Thread-safe: one caller at a time.

    Args:
        engine: the unit.
        backend: owns its buffers.
        decoder: tiles and scale.
        latents: (C, H, W) of one image.
    """

    def __init__(self, engine: Engine, backend: Backend, decoder: DecoderSpec, latents: tuple[int, int, int]) -> None:
        channels, height, width = latents
        assert height == width, latents
        tile, scale = decoder.tile, decoder.upscale
        self._backend, self._decoder, self._side = backend, decoder, height
        self._input = backend.allocate((1, channels, tile, tile), "float32")
        self._output = backend.allocate((1, decoder.channels, tile * scale, tile * scale), "float32")
        self._run = engine.bind({"latents": self._input}, {"pixels": self._output})
        self._starts = tile_starts(height, tile, decoder.overlap)
        last = len(self._starts) - 1
        self._ramps = [
            ramp(tile * scale, decoder.overlap * scale, first=i == 0, last=i == last) for i in range(last + 1)
        ]
        self._lock = threading.Lock()

    def images(self, latents: np.ndarray) -> np.ndarray:
        """Decode images one after the other.

        Args:
            latents: (N, C, H, W) float32.

        Returns:
            (N, H*upscale, W*upscale, channels) uint8.
        """
        with self._lock:
            return np.stack([pixels_to_uint8(self.pixels(image)) for image in latents])

    def pixels(self, latents: np.ndarray) -> np.ndarray:
        """One image: (C, H, W) float32 latents to (channels, H*upscale, W*upscale) float32, about -1..1."""
        tile, scale, side = self._decoder.tile, self._decoder.upscale, self._side * self._decoder.upscale
        if len(self._starts) == 1:
            return self._decoded(latents)
        total = np.zeros((self._decoder.channels, side, side))
        weight = np.zeros((side, side))
        for (i, y), (j, x) in product(enumerate(self._starts), repeat=2):
            there = np.s_[y * scale : (y + tile) * scale, x * scale : (x + tile) * scale]
            share = np.outer(self._ramps[i], self._ramps[j])
            total[:, *there] += share * self._decoded(latents[:, y : y + tile, x : x + tile])
            weight[there] += share
        return (total / weight).astype(np.float32)

    def _decoded(self, latents: np.ndarray) -> np.ndarray:
        self._backend.upload(latents[None], self._input)
        self._run()
        pixels: np.ndarray = self._backend.download(self._output)[0]
        return pixels
