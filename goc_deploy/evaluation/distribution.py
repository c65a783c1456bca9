"""Sets of images against a reference set: FID, sFID, inception score, precision, recall, KID, label agreement."""

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
MAX_MANIFOLD_IMAGES = 10_000  # ADM measures precision and recall with as many reference images
READ_IMAGES = 256


class FeatureSet:
    """Features of images that come in batches. Spatial activations are kept as mean and covariance only."""

    def __init__(self, images: int) -> None:
        self._images = images
        self.count = 0
        self._features = np.empty((0, 0), np.float32)
        self._probabilities: np.ndarray | None = None
        self._spatial: Moments | None = None

    def add(self, found: Extracted) -> None:
        """Take in a batch."""
        rows = slice(self.count, self.count + len(found.features))
        if self.count == 0:
            self._features = np.empty((self._images, found.features.shape[1]), np.float32)
            self._spatial = None if found.spatial is None else Moments(found.spatial.shape[1])
            if found.logits is not None:
                self._probabilities = np.empty((self._images, found.logits.shape[1]), np.float32)
        self._features[rows] = found.features
        if found.logits is not None and self._probabilities is not None:
            self._probabilities[rows] = probabilities_from_logits(found.logits)
        if found.spatial is not None and self._spatial is not None:
            self._spatial.add(found.spatial)
        self.count = rows.stop

    @property
    def features(self) -> np.ndarray:
        """(n, d) float32 of the images taken in so far."""
        return self._features[: self.count]

    @property
    def probabilities(self) -> np.ndarray | None:
        """(n, K) float32, or None where the extractor has no logits."""
        return None if self._probabilities is None else self._probabilities[: self.count]

    @property
    def spatial(self) -> Gaussian | None:
        """Of the spatial activations, or None where the extractor has none or fewer than two images came."""
        return (
            self._spatial.gaussian()
            if self._spatial is not None and self._spatial.count > 1
            else None
        )


@dataclass(frozen=True, slots=True)
class Reference:
    """What samples are compared with.

    Attributes:
        pooled: of the features.
        spatial: of the spatial activations, or None.
        features: (M, d) of at most 10,000 reference images, or None where the file has statistics only.
        images: how many the statistics are of, or 0 where the file does not tell.
    """

    pooled: Gaussian
    spatial: Gaussian | None
    features: np.ndarray | None
    images: int


def reference_from_adm(file: AdmFile, extractor: Extractor, progress: Progress) -> Reference:
    """Features of a reference file; statistics that it brings along are used as they are, as ADM's evaluator does.

    Raises:
        UsageError: fewer than two images.
    """
    if file.shape is None:
        assert file.statistics is not None
        return Reference(file.statistics, file.spatial_statistics, None, 0)
    count, height, width, _ = file.shape
    if count < 2:
        raise UsageError(f"{file.path} has {count} image, a reference needs at least 2")
    extractor.check_images(height, width)
    found = FeatureSet(count)
    for images in file.batches(READ_IMAGES):
        progress("features of the reference", found.count, count)
        found.add(extractor.extract(images))
    return Reference(
        file.statistics or gaussian_of(found.features),
        file.spatial_statistics or found.spatial,
        found.features[:MAX_MANIFOLD_IMAGES],
        0 if file.statistics else count,
    )


def check_widths(statistics: Gaussian, width: int, name: str) -> None:
    """Raise UsageError where the statistics of a reference are of other features than the extractor's."""
    found = statistics.mean.shape, statistics.covariance.shape
    if found != ((width,), (width, width)):
        raise UsageError(
            f"the reference has statistics of {found[0][-1] if found[0] else 0} features but {name} has {width}; "
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
    """Every metric that the extractor and the reference allow.

    Args:
        samples: of the images of one plan, in order.
        labels: (N,) labels that they were made for.
        classes: of the model; agreement needs as many logits.
        reference: what FID, sFID, precision, recall and KID compare with, or None.
        resamples: of the bootstrap of FID and inception score.
        seed: of all resampling.

    Returns:
        Some of ``fid``, ``sfid``, ``kid``, ``precision``, ``recall``, ``inception_score``, ``agreement``.
    """
    found: dict[str, Estimate] = {}
    features, probabilities = samples.features, samples.probabilities
    if reference is not None and len(features) > 1:
        found["fid"] = bootstrap(
            lambda chosen: frechet_distance(gaussian_of(features[chosen]), reference.pooled),
            len(features), resamples, seed,
        )  # fmt: skip
        spatial = samples.spatial
        if spatial is not None and reference.spatial is not None:
            found["sfid"] = exact(frechet_distance(spatial, reference.spatial))
        if reference.features is not None:
            found["kid"] = kernel_distance(features, reference.features, seed)
            if min(len(features), len(reference.features)) > NEIGHBOUR:
                precise, recalled = precision_and_recall(features, reference.features)
                found["precision"], found["recall"] = (
                    mean_estimate(precise, seed),
                    mean_estimate(recalled, seed),
                )
    if probabilities is not None:
        found["inception_score"] = bootstrap(
            lambda chosen: inception_score(probabilities[chosen]), len(features), resamples, seed
        )
        if probabilities.shape[1] == classes:
            found["agreement"] = mean_estimate(probabilities.argmax(axis=1) == labels, seed)
    return found
