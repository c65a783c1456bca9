from __future__ import annotations

import hashlib
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from goc_deploy.errors import UsageError
from goc_deploy.runtime.noise import image_noise

SHAPE = (2, 2, 2)
WORDS = st.integers(0, 2**64 - 1)


@given(WORDS, WORDS, WORDS, WORDS)
def test_two_images_have_the_same_noise_only_if_seed_and_index_agree(
    a: int, b: int, seed: int, index: int
) -> None:
    assert np.array_equal(image_noise(a, index, 1, SHAPE), image_noise(b, index, 1, SHAPE)) == (
        a == b
    )
    assert np.array_equal(image_noise(seed, a, 1, SHAPE), image_noise(seed, b, 1, SHAPE)) == (
        a == b
    )


def test_neighbours_of_every_power_of_two_differ() -> None:
    words = sorted(
        {
            min(max(2**bit + step, 0), 2**64 - 1)
            for bit in (0, 31, 32, 52, 53, 54, 62, 63, 64)
            for step in (-1, 0, 1)
        }
    )
    noise = {word: image_noise(word, 3, 1, SHAPE) for word in words}
    assert not any(np.array_equal(noise[a], noise[b]) for a, b in combinations(words, 2))


def test_noise_of_small_seeds_stays_what_it_was() -> None:
    noise = b"".join(
        image_noise(seed, image, 2, SHAPE).tobytes()
        for seed in (0, 7, 2**63 - 1)
        for image in (0, 5)
    )
    assert (
        hashlib.sha256(noise).hexdigest()
        == "8a8d2e1325612d801255f299905a4fce196497e88d98bc49ed6cc8843a40493a"
    )


@pytest.mark.parametrize(
    ("seed", "image", "name"),
    [(-1, 0, "seed"), (2**64, 0, "seed"), (0, -1, "image"), (0, 2**64, "image")],
)
def test_what_no_key_can_hold_is_refused(seed: int, image: int, name: str) -> None:
    with pytest.raises(UsageError, match=rf"{name}.* must be within 0\.\.2\*\*64-1"):
        image_noise(seed, image, 1, SHAPE)
