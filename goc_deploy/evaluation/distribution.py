"""Comparison of a set of images with a reference set, such as FID, KID and precision."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from goc_deploy.errors import UsageError
from goc_deploy.evaluation.features import Extracted, Extractor
from goc_deploy.metrics.classes import inception_score, probabilities_from_logits
from goc_deploy.metrics.estimate import Estimate, bootstrap, exact, mean_estimate
from goc_deploy.metrics.frechet import Gaussian, Moments, frechet_distance, gaussian_of
from goc_deploy.metrics.kernel import kernel_distance
from goc_deploy.metrics.manifold import NEIGHBOUR, precision_and_recall
from goc_deploy.options import Progress
from goc_deploy.runtime.adm import AdmFile

MAX_RESAMPLED_WIDTH = 512
MAX_MANIFOLD_IMAGES = 10_000  # number of images in ADM's precision and recall
READ_IMAGES = 256


class FeatureSet:
    """Features of images, added in batches; spatial activations only as mean and covariance."""

    def __init__(self, images: int) -> None:
        self._images = images
        self.count = 0
        self._features = np.empty((0, 0), np.float32)
        self._probabilities: np.ndarray | None = None
        self._spatial: Moments | None = None

    def add(self, batch: Extracted) -> None:
        """Add the features of a batch."""
        rows = slice(self.count, self.count + len(batch.features))
        if self.count == 0:
            self._features = np.empty((self._images, batch.features.shape[1]), np.float32)
            self._spatial = None if batch.spatial is None else Moments(batch.spatial.shape[1])
            if batch.logits is not None:
                self._probabilities = np.empty((self._images, batch.logits.shape[1]), np.float32)
        self._features[rows] = batch.features
        if batch.logits is not None and self._probabilities is not None:
            self._probabilities[rows] = probabilities_from_logits(batch.logits)
        if batch.spatial is not None and self._spatial is not None:
            self._spatial.add(batch.spatial)
        self.count = rows.stop

    @property
    def features(self) -> np.ndarray:
        """(n, d) float32, the features of the images added so far."""
        return self._features[: self.count]

    @property
    def probabilities(self) -> np.ndarray | None:
        """(n, K) float32, or None if the extractor has no logits."""
        return None if self._probabilities is None else self._probabilities[: self.count]

    @property
    def spatial(self) -> Gaussian | None:
        """Distribution of spatial activations; None without them or with fewer than 2 images."""
        return (
            self._spatial.gaussian()
            if self._spatial is not None and self._spatial.count > 1
            else None
        )


@dataclass(frozen=True, slots=True)
class Reference:
    """A reference set that samples are compared with.

    Attributes:
        pooled: distribution of the features.
        spatial: distribution of the spatial activations, or None.
        features: (M, d) of at most 10,000 reference images, or None if the file has statistics
            only.
        images: number of images of the statistics, or 0 if the file does not state it.
    """

    pooled: Gaussian
    spatial: Gaussian | None
    features: np.ndarray | None
    images: int


def reference_from_adm(file: AdmFile, extractor: Extractor, progress: Progress) -> Reference:
    """Extract the features of a reference file.

    Statistics in the file are used as they are, as ADM's evaluator does.

    Raises:
        UsageError: the file has fewer than two images.
    """
    if file.shape is None:
        assert file.statistics is not None
        return Reference(file.statistics, file.spatial_statistics, None, 0)
    count, height, width, _ = file.shape
    if count < 2:
        raise UsageError(f"{file.path} has {count} image, a reference needs at least 2")
    extractor.check_images(height, width)
    feature_set = FeatureSet(count)
    for images in file.batches(READ_IMAGES):
        progress("features of the reference", feature_set.count, count)
        feature_set.add(extractor.extract(images))
    return Reference(
        file.statistics or gaussian_of(feature_set.features),
        file.spatial_statistics or feature_set.spatial,
        feature_set.features[:MAX_MANIFOLD_IMAGES],
        0 if file.statistics else count,
    )


def check_widths(statistics: Gaussian, width: int, name: str) -> None:
    """Raise UsageError if the reference has statistics of other features than the extractor's."""
    shapes = statistics.mean.shape, statistics.covariance.shape
    if shapes != ((width,), (width, width)):
        raise UsageError(
            f"the reference has statistics of {shapes[0][-1] if shapes[0] else 0} features but "
            f"{name} has {width}; "
            f"use the extractor that it was made with, or a reference with images only"
        )


def distribution_metrics(
    samples: FeatureSet,
    labels: np.ndarray,
    classes: int,
    reference: Reference | None,
    resamples: int,
    seed: int,
) -> dict[str, Estimate]:
    """Compute every metric that the extractor and the reference allow.

    Args:
        samples: features of the images of one plan, in order.
        labels: (N,) labels that they were made for.
        classes: number of classes of the model; agreement needs as many logits.
        reference: the reference of FID, sFID, precision, recall and KID, or None.
        resamples: number of bootstrap resamples of FID and inception score.
        seed: seed of all resampling.

    Returns:
        Some of ``fid``, ``sfid``, ``kid``, ``precision``, ``recall``, ``inception_score`` and
        ``agreement``.
    """
    metrics: dict[str, Estimate] = {}
    features, probabilities = samples.features, samples.probabilities
    if reference is not None and len(features) > 1:
        metrics["fid"] = bootstrap(
            lambda indices: frechet_distance(gaussian_of(features[indices]), reference.pooled),
            len(features),
            resamples,
            seed,
        )
        spatial = samples.spatial
        if spatial is not None and reference.spatial is not None:
            metrics["sfid"] = exact(frechet_distance(spatial, reference.spatial))
        if reference.features is not None:
            metrics["kid"] = kernel_distance(features, reference.features, seed)
            if min(len(features), len(reference.features)) > NEIGHBOUR:
                precise, recalled = precision_and_recall(features, reference.features)
                metrics["precision"], metrics["recall"] = (
                    mean_estimate(precise, seed),
                    mean_estimate(recalled, seed),
                )
    if probabilities is not None:
        metrics["inception_score"] = bootstrap(
            lambda indices: inception_score(probabilities[indices]), len(features), resamples, seed
        )
        if probabilities.shape[1] == classes:
            metrics["agreement"] = mean_estimate(probabilities.argmax(axis=1) == labels, seed)
    return metrics
