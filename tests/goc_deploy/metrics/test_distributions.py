"""The distribution metrics against torchmetrics, SciPy and their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from scipy.spatial.distance import cdist
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import poly_mmd

from goc_deploy.metrics.classes import inception_score, probabilities_from_logits
from goc_deploy.metrics.frechet import Gaussian, Moments, frechet_distance, gaussian_of
from goc_deploy.metrics.kernel import kernel_distance, squared_mmd
from goc_deploy.metrics.manifold import precision_and_recall

WIDTH = 6


def features(seed: int, count: int, shift: float = 0.0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    mixed = generator.normal(size=(count, WIDTH)) @ generator.normal(size=(WIDTH, WIDTH))
    return (mixed + shift).astype(np.float32)


@given(st.integers(0, 10_000), st.integers(0, 10_000))
def test_the_frechet_distance_is_that_of_a_matrix_square_root(seed_a: int, seed_b: int) -> None:
    a, b = gaussian_of(features(seed_a, 40)), gaussian_of(features(seed_b, 30, 0.5))
    root = sqrtm(a.covariance @ b.covariance)
    shift = a.mean - b.mean
    expected = shift @ shift + np.trace(a.covariance + b.covariance - 2 * root.real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_the_frechet_distance_is_exact_where_covariances_are_singular() -> None:
    a = Gaussian(np.zeros(3), np.diag([1.0, 0.0, 4.0]))
    b = Gaussian(np.array([1.0, 0.0, 0.0]), np.diag([9.0, 1.0, 0.0]))
    assert frechet_distance(a, b) == pytest.approx(1 + (1 + 4) + (9 + 1) - 2 * 3)


@given(st.lists(st.integers(0, 17), min_size=1, max_size=6), st.floats(-1e3, 1e3))
def test_moments_of_batches_are_those_of_the_whole(sizes: list[int], shift: float) -> None:
    parts = [features(i, size, shift) for i, size in enumerate([*sizes, 2])]
    whole = np.concatenate(parts).astype(np.float64)
    moments = Moments(WIDTH)
    for part in parts:
        moments.add(part)
    found = moments.gaussian()
    assert moments.count == len(whole)
    np.testing.assert_allclose(found.mean, whole.mean(axis=0), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(found.covariance, np.cov(whole, rowvar=False), rtol=1e-6, atol=1e-6)


@given(st.integers(0, 10_000))
@settings(max_examples=20)
def test_squared_mmd_is_that_of_torchmetrics(seed: int) -> None:
    x, y = features(seed, 20), features(seed + 1, 20, 0.3)
    expected = float(poly_mmd(torch.from_numpy(x).double(), torch.from_numpy(y).double()))
    assert squared_mmd(x, y) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_the_kernel_distance_is_unbiased_and_its_interval_shrinks_with_the_images() -> None:
    whole = features(3, 1600)
    small = kernel_distance(whole[:80], whole[80:160], 0, subsets=60, subset_size=40)
    large = kernel_distance(whole[:800], whole[800:], 0, subsets=60, subset_size=40)
    assert small.low < 0 < small.high
    assert large.low < 0 < large.high
    assert large.high - large.low < 0.5 * (small.high - small.low)
    assert (
        kernel_distance(whole[:100], whole[100:200] + np.float32(2), 0, subsets=3).value
        > small.high
    )


@given(st.integers(0, 10_000), st.integers(5, 40), st.floats(0, 3))
@settings(max_examples=30)
def test_precision_and_recall_are_those_of_the_definition(
    seed: int, count: int, shift: float
) -> None:
    samples, reference = features(seed, count), features(seed + 1, 30, shift)

    def covered(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
        radii = np.sort(cdist(centres, centres), axis=1)[:, 3]  # the first is the centre itself
        return (cdist(points, centres) <= radii).any(axis=1)

    precise, recalled = precision_and_recall(samples, reference)
    np.testing.assert_array_equal(precise, covered(samples, reference))
    np.testing.assert_array_equal(recalled, covered(reference, samples))


def test_precision_is_exact_for_features_far_from_the_origin() -> None:
    near, far = precision_and_recall(features(0, 50), features(1, 50))
    shifted = precision_and_recall(
        features(0, 50) + np.float32(1000), features(1, 50) + np.float32(1000)
    )
    assert (near.mean(), far.mean()) == pytest.approx(
        (shifted[0].mean(), shifted[1].mean()), abs=0.03
    )


@pytest.mark.filterwarnings("ignore:std")  # torchmetrics wants the spread over a single split
def test_the_inception_score_is_that_of_torchmetrics() -> None:
    logits = np.random.default_rng(0).normal(scale=3, size=(80, 10)).astype(np.float32)
    with pytest.warns(UserWarning, match="save all extracted features"):
        reference = InceptionScore(feature=torch.nn.Identity(), splits=1)
    reference.update(torch.from_numpy(logits))
    found = inception_score(probabilities_from_logits(logits))
    assert found == pytest.approx(float(reference.compute()[0]), rel=1e-5)


def test_the_inception_score_of_balanced_classes_is_their_number_unless_sorted() -> None:
    labels = np.repeat(np.arange(10), 100)
    shuffled = np.random.default_rng(0).permutation(labels)
    certain = np.eye(10, dtype=np.float32)
    assert inception_score(certain[labels]) == pytest.approx(10)
    assert inception_score(certain[shuffled], 250) > 9.5
    assert inception_score(certain[labels], 250) < 3.1
