from __future__ import annotations

import numpy as np
import pytest

from goc_deploy.errors import UsageError
from goc_deploy.runtime.images import grid, images_from_latents
from goc_deploy.runtime.results import Result


def test_pixels_are_scaled_as_the_reference_does() -> None:
    latents = np.array([-2, -1, 0, 0.99, 1, 2], np.float32).reshape(1, 1, 2, 3)
    assert images_from_latents(latents).ravel().tolist() == [0, 0, 128, 254, 255, 255]


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_and_colour_give_images_and_latents_do_not(channels: int) -> None:
    assert images_from_latents(np.zeros((2, channels, 4, 4), np.float32)).shape == (
        2,
        4,
        4,
        channels,
    )
    assert images_from_latents(np.zeros((2, 4, 4, 4), np.float32)) is None


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_holds_every_picture(channels: int) -> None:
    images = np.random.default_rng(0).integers(0, 255, (5, 4, 6, channels), np.uint8)
    canvas = np.asarray(grid(images, scale=2, gap=1)).reshape(2 * 8 + 1, 3 * 12 + 2, -1)
    np.testing.assert_array_equal(canvas[9:17:2, 13:25:2].reshape(4, 6, channels), images[4])


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_a_result_gives_its_pictures_to_pillow(channels: int, mode: str) -> None:
    images = np.arange(2 * 4 * 6 * channels, dtype=np.uint8).reshape(2, 4, 6, channels)
    result = Result(images, np.zeros((2, channels, 4, 6), np.float32), None, {})
    assert [(picture.mode, picture.size) for picture in result.pil()] == [(mode, (6, 4))] * 2
    np.testing.assert_array_equal(
        np.stack([np.asarray(p).reshape(4, 6, channels) for p in result.pil()]), images
    )


def test_latents_without_a_decoder_are_no_pictures() -> None:
    result = Result(None, np.zeros((1, 4, 4, 4), np.float32), None, {})
    with pytest.raises(
        UsageError, match=r"the result has latents but no images; .* with its decoder"
    ):
        result.pil()
