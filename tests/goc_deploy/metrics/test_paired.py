from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from goc_deploy.metrics.paired import psnr_db, relative_l2, ssim, whole_relative_l2
from tests import reference


def pair(seed: int, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    first = generator.integers(0, 256, shape)
    second = np.clip(first + generator.integers(-60, 61, shape), 0, 255)
    return first.astype(np.uint8), second.astype(np.uint8)


@given(st.integers(0, 2**32 - 1), st.integers(11, 30), st.integers(11, 30), st.sampled_from([1, 3]))
@settings(max_examples=30)
def test_ssim_and_psnr_are_those_of_scikit_image(
    seed: int, height: int, width: int, channels: int
) -> None:
    x, y = pair(seed, (2, height, width, channels))
    for i, (similarity, ratio) in enumerate(zip(ssim(x, y), psnr_db(x, y), strict=True)):
        expected = structural_similarity(
            x[i],
            y[i],
            channel_axis=2,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=255,
        )
        assert similarity == pytest.approx(expected, abs=1e-9)
        assert ratio == pytest.approx(peak_signal_noise_ratio(x[i], y[i]))


def test_equal_images_have_a_finite_ratio_that_no_other_pair_exceeds() -> None:
    x = np.zeros((1, 12, 12, 1), np.uint8)
    near = x.copy()
    near[0, 3, 4, 0] = 1
    assert np.isfinite(psnr_db(x, x)).all()
    assert psnr_db(x, x) == pytest.approx(psnr_db(near, x))
    assert ssim(x, x) == pytest.approx(1)


@given(st.integers(0, 2**32 - 1), st.floats(0.01, 100))
def test_relative_l2_does_not_depend_on_scale_and_is_one_number_per_image(
    seed: int, scale: float
) -> None:
    generator = np.random.default_rng(seed)
    x, y = generator.normal(size=(2, 3, 4, 2, 2))
    expected = [np.linalg.norm(x[i] - y[i]) / np.linalg.norm(y[i]) for i in range(3)]
    np.testing.assert_allclose(relative_l2(x, y), expected)
    np.testing.assert_allclose(relative_l2(scale * x, scale * y), expected)


def test_an_error_that_is_not_finite_is_infinite() -> None:
    assert whole_relative_l2(np.array([np.nan]), np.array([1.0])) == np.inf
    assert whole_relative_l2(np.array([1.1]), np.array([1.0])) == pytest.approx(
        reference.relative_l2(np.array([1.1]), np.array([1.0]))
    )
