"""goc-eval's work: sample every plan on the same noise and labels, and compare."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from goc_deploy.engine_dir import load_plan
from goc_deploy.errors import UsageError
from goc_deploy.evaluation.adm import AdmFile, open_adm
from goc_deploy.evaluation.collect import PlanScores, collect
from goc_deploy.evaluation.distribution import (
    MAX_RESAMPLED_WIDTH,
    FeatureSet,
    Reference,
    check_widths,
    distribution_metrics,
    reference_from_adm,
)
from goc_deploy.evaluation.features import Extractor, make_extractor
from goc_deploy.evaluation.pairing import baselines
from goc_deploy.evaluation.sampling import class_labels, samples_of_plans
from goc_deploy.options import EvalOptions, Progress
from goc_deploy.publish import read_manifest
from goc_deploy.schedule import Schedule
from goc_deploy.spec import ModelSpec
from goc_deploy.version import __version__

FORMAT, VERSION = "goc_deploy.evaluation", 1
IMAGE_CHANNELS = (1, 3)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What `evaluate` returns.

    Attributes:
        found: every number, plain JSON types.
        schedules: of every plan, for heat maps.
        pictures: plan -> (n, H, W, 1 or 3) uint8 first images, all from the same noise; empty without images.
    """

    found: dict[str, Any]
    schedules: dict[str, Schedule]
    pictures: dict[str, np.ndarray]


def evaluate(engine_dir: Path, options: EvalOptions, progress: Progress) -> Evaluation:
    """Evaluate plans of an engine directory.

    Memory: features, one number per image and metric, and one batch; the images themselves are never all held.

    Raises:
        UsageError: an option, plan, reference, sample file or extractor that does not fit.
        EngineDirError: the engine directory is corrupt.
        EnvironmentUnsupportedError: a package is missing.
    """
    manifest = read_manifest(engine_dir)
    names = options.plans or tuple(entry.name for entry in manifest.plans)
    plans = [load_plan(engine_dir, manifest, name) for name in names]
    if len({plan.name for plan in plans}) != len(plans):
        raise UsageError("a plan is named twice; give each --plan once")
    compared_with = baselines(plans)
    spec = manifest.model
    has_images = spec.channels in IMAGE_CHANNELS
    warnings: list[str] = []
    files = samples_of_plans(options.samples, [plan.name for plan in plans]) if options.samples else {}
    labels = _labels(files, options, spec)
    if not has_images:
        _refuse_image_outputs(options, spec)
        warnings.append(
            f"the model makes {spec.channels}-channel latents, which need a VAE to become images: "
            f"only latents are compared"
        )
    extractor = make_extractor(options.features, options.inception_weights) if options.features else None
    if extractor is not None:
        extractor.check_images(spec.side, spec.side)
    reference = _reference(options, extractor, spec, progress)
    scores = {plan.name: PlanScores(plan, compared_with[plan.name], FeatureSet(len(labels))) for plan in plans}
    machine = collect(engine_dir, files, labels, options, scores, extractor, progress)
    resamples = _resamples(options, scores, warnings)
    if reference is not None and extractor is not None:
        _check_reference(reference, len(labels), extractor, next(iter(scores.values())).features, warnings)
    found = {}
    for number, (name, of_plan) in enumerate(scores.items()):
        progress(f"metrics of {name}", number, len(scores))
        estimates = of_plan.paired.estimates(options.seed)
        if extractor is not None:
            estimates |= distribution_metrics(
                of_plan.features, labels, spec.classes, reference, resamples, options.seed
            )
        found[name] = {**of_plan.entry(), "metrics": {key: asdict(value) for key, value in estimates.items()}}
    return Evaluation(
        {
            "format": FORMAT,
            "version": VERSION,
            "goc_deploy": __version__,
            "machine": machine,
            "model": asdict(spec),
            "precision": manifest.precision,
            "provenance": manifest.provenance,
            "images": len(labels),
            "resamples": resamples,
            "features": None if extractor is None else extractor.name,
            "options": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(options).items()},
            "warnings": warnings,
            "plans": found,
        },
        {plan.name: plan.schedule for plan in plans},
        {n: np.concatenate(s.pictures)[: options.grid_images] for n, s in scores.items() if s.pictures},
    )


def _labels(files: dict[str, AdmFile], options: EvalOptions, spec: ModelSpec) -> np.ndarray:
    if not files:
        if options.num_images < 1:
            raise UsageError(f"the number of images must be at least 1, got {options.num_images}")
        return class_labels(options.labels, options.num_images, spec.classes, options.seed)
    file = next(iter(files.values()))
    assert file.shape is not None
    assert file.labels is not None
    if file.shape[1:3] != (spec.side, spec.side):
        raise UsageError(
            f"{file.path} has images of {file.shape[1]}x{file.shape[2]}, this model makes {spec.side}x{spec.side}"
        )
    return file.labels


def _refuse_image_outputs(options: EvalOptions, spec: ModelSpec) -> None:
    for given, name in (
        (options.samples, "--samples"),
        (options.samples_output, "--samples-output"),
        (options.features, "--features"),
        (options.reference, "--reference"),
    ):
        if given is not None:
            raise UsageError(
                f"{name} needs images, but this model makes {spec.channels}-channel latents, which need a VAE; leave it out"
            )


def _reference(
    options: EvalOptions, extractor: Extractor | None, spec: ModelSpec, progress: Progress
) -> Reference | None:
    if options.reference is None:
        return None
    if extractor is None:
        raise UsageError("--reference needs --features to compare with; give an ONNX model or 'inception'")
    file = open_adm(options.reference)
    if file.shape is not None and file.shape[1:3] != (spec.side, spec.side):
        raise UsageError(
            f"the reference {file.path} has images of {file.shape[1]}x{file.shape[2]}, this model makes {spec.side}x{spec.side}"
        )
    return reference_from_adm(file, extractor, progress)


def _check_reference(
    reference: Reference, images: int, extractor: Extractor, samples: FeatureSet, warnings: list[str]
) -> None:
    width = samples.features.shape[1]
    check_widths(reference, width, extractor.name)
    for count, what in ((images, "samples"), (reference.images or images, "reference images")):
        if count <= width:
            warnings.append(
                f"{count} {what} for {width} features: FID needs more images than features, and many more to be "
                f"comparable; read KID instead"
            )


def _resamples(options: EvalOptions, scores: dict[str, PlanScores], warnings: list[str]) -> int:
    width = next(iter(scores.values())).features.features.shape[1]
    if width > MAX_RESAMPLED_WIDTH and options.resamples:
        warnings.append(f"FID and inception score have no interval: {width} features make resampling slow")
        return 0
    return options.resamples
