"""The extractor and the reference of an evaluation, checked before any image is sampled."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from goc_deploy.errors import UsageError
from goc_deploy.evaluation.distribution import (
    MAX_RESAMPLED_WIDTH,
    FeatureSet,
    Reference,
    check_widths,
    distribution_metrics,
    reference_from_adm,
)
from goc_deploy.evaluation.features import Extractor, make_extractor
from goc_deploy.metrics.estimate import Estimate
from goc_deploy.options import EvalOptions, Progress
from goc_deploy.runtime.adm import open_adm
from goc_deploy.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Judges:
    """The extractor and the reference that sets of images are judged by.

    Attributes:
        extractor: extractor of features, or None if only paired metrics are wanted.
        reference: reference set, or None.
        resamples: number of bootstrap resamples of FID and inception score.
        warnings: sentences about the limits of the numbers.
    """

    extractor: Extractor | None
    reference: Reference | None
    resamples: int
    warnings: tuple[str, ...]

    def metrics(
        self, features: FeatureSet, labels: np.ndarray, classes: int, seed: int
    ) -> dict[str, Estimate]:
        """Compute every distribution metric that is possible; none without an extractor."""
        if self.extractor is None:
            return {}
        return distribution_metrics(features, labels, classes, self.reference, self.resamples, seed)


def make_judges(
    options: EvalOptions, spec: ModelSpec, side: int | None, images: int, progress: Progress
) -> Judges:
    """Load the extractor and the reference, and check that they fit the images.

    Args:
        options: options of the evaluation.
        spec: the model.
        side: height and width of the images, or None if there are only latents.
        images: number of images per plan.
        progress: called with (name, done, total).

    Raises:
        UsageError: an extractor or reference does not fit, or an option needs images but there are
            none.
        EnvironmentUnsupportedError: a package is missing.
    """
    if side is None:
        return _judges_of_latents(options, spec)
    if options.features is None:
        if options.reference is not None:
            raise UsageError(
                "`reference` needs `features` to compare with; give an ONNX model or 'inception'"
            )
        return Judges(None, None, 0, ())
    extractor = make_extractor(options.features, options.inception_weights, options.threads)
    extractor.check_images(side, side)
    black = np.zeros((1, side, side, 1), np.uint8)
    width = extractor.extract(black).features.shape[1]
    reference = _reference(options, extractor, width, side, progress)
    warnings = []
    if reference is not None:
        for count, what in ((images, "samples"), (reference.images or images, "reference images")):
            if count <= width:
                warnings.append(
                    f"{count} {what} for {width} features: FID needs more images than features, "
                    "and many more to be "
                    f"comparable; read KID instead"
                )
    resamples = options.resamples
    if width > MAX_RESAMPLED_WIDTH and resamples:
        warnings.append(
            f"FID and inception score have no interval: {width} features make resampling slow"
        )
        resamples = 0
    return Judges(extractor, reference, resamples, tuple(warnings))


def _judges_of_latents(options: EvalOptions, spec: ModelSpec) -> Judges:
    """Return no judges and a warning about that; refuse options that need images."""
    latents = f"this model makes {spec.channels}-channel latents, which need a VAE to become images"
    for value, name in (
        (options.samples_output, "`samples_output`"),
        (options.features, "`features`"),
        (options.reference, "`reference`"),
    ):
        if value is not None:
            raise UsageError(
                f"{name} needs images, but {latents}; leave it out, or decode elsewhere and "
                "use `samples`"
            )
    return Judges(None, None, 0, (f"{latents}: only latents are compared",))


def _reference(
    options: EvalOptions, extractor: Extractor, width: int, side: int, progress: Progress
) -> Reference | None:
    if options.reference is None:
        return None
    file = open_adm(options.reference)
    if file.shape is not None and file.shape[1:3] != (side, side):
        raise UsageError(
            f"the reference {file.path} has images of {file.shape[1]}x{file.shape[2]}, this model "
            f"makes {side}x{side}"
        )
    if file.statistics is not None:
        check_widths(file.statistics, width, extractor.name)
    return reference_from_adm(file, extractor, progress)
