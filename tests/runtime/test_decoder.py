"""Tiles: they cover everything, and their weights add up.

A local decoder makes the same picture from tiles as in one piece.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from goc_deploy.engines.ort import OrtBackend
from goc_deploy.protocols import Buffer, Stream
from goc_deploy.runtime.decoder import LatentDecoder, ramp, tile_starts
from goc_deploy.spec import DecoderSpec, ModelSpec, tiles_at_once

SPEC = ModelSpec(1, 8, 2, 16, 1, 13, 4, 10, False)  # latents of 13x13


class Doubler:
    """An engine that repeats every latent pixel twice: local, so tiles must change nothing."""

    dtypes: Mapping[str, str] = {"latents": "float32", "pixels": "float32"}

    def __init__(self, backend: OrtBackend) -> None:
        self._backend = backend

    def bind(
        self,
        inputs: Mapping[str, Buffer],
        outputs: Mapping[str, Buffer],
        stream: Stream | None = None,
    ) -> Callable[[], None]:
        assert stream is not None

        def run() -> None:
            x = self._backend.download(inputs["latents"])
            self._backend.upload(x[:, :3].repeat(2, 2).repeat(2, 3), outputs["pixels"])

        return run


@given(side=st.integers(1, 200), tile=st.integers(2, 64), data=st.data())
def test_tiles_cover_a_side_and_overlap(side: int, tile: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(1, tile - 1))
    starts = tile_starts(side, tile, overlap)
    assert starts[0] == 0
    if side <= tile:
        assert starts == (0,)
        return
    assert starts[-1] == side - tile
    assert all(0 < b - a <= tile - overlap for a, b in pairwise(starts))


def test_weights_are_positive_and_one_where_nothing_is_near() -> None:
    assert (ramp(8, 3, first=False, last=False) > 0).all()
    np.testing.assert_allclose(ramp(8, 2, first=True, last=False), [1, 1, 1, 1, 1, 1, 0.75, 0.25])


def test_a_local_decoder_gives_the_same_in_tiles() -> None:
    backend = OrtBackend()
    latents = np.random.default_rng(0).standard_normal((2, 4, 13, 13)).astype(np.float32)
    tiled = LatentDecoder(Doubler(backend), backend, DecoderSpec(3, 2, 5, 2), SPEC)
    expected = latents[:, :3].repeat(2, 2).repeat(2, 3)
    for found, whole in zip(tiled.pixels(latents), expected, strict=True):
        np.testing.assert_allclose(found, whole, atol=1e-6)
    images = tiled.images(latents)
    assert images.dtype == np.uint8
    assert images.shape == (2, 26, 26, 3)


@pytest.mark.parametrize("size", [(3, 13), (7, 4), (2, 3)])
def test_an_image_may_be_smaller_than_a_tile(size: tuple[int, int]) -> None:
    backend = OrtBackend()
    latents = np.random.default_rng(0).standard_normal((3, 4, *size)).astype(np.float32)
    tiled = LatentDecoder(Doubler(backend), backend, DecoderSpec(3, 2, 5, 2), SPEC)
    expected = latents[:, :3].repeat(2, 2).repeat(2, 3)
    np.testing.assert_allclose(np.stack(list(tiled.pixels(latents))), expected, atol=1e-6)


@given(side=st.integers(1, 300))
def test_a_launch_of_the_decoder_has_bounded_memory(side: int) -> None:
    tiles = tiles_at_once(ModelSpec(1, 8, 2, 16, 1, side, 4, 10, False))
    assert tiles == 1 or (tiles <= 8 and tiles * side**2 <= 64**2)
