"""The evaluation of goc-eval: sample every plan on the same noise and labels, and compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from goc_deploy.compiler import Plan
from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.engine_dir.manifest import Manifest
from goc_deploy.errors import UsageError
from goc_deploy.evaluation.collect import PlanScores, collect, row_of_full
from goc_deploy.evaluation.distribution import FeatureSet
from goc_deploy.evaluation.judges import Judges, make_judges
from goc_deploy.evaluation.pairing import baselines
from goc_deploy.evaluation.preset import plans_of_preset
from goc_deploy.evaluation.sampling import class_labels, samples_of_plans
from goc_deploy.guidance import cfg_scale_of
from goc_deploy.options import EvalOptions, Progress
from goc_deploy.runtime.adm import AdmFile
from goc_deploy.schedule import Schedule
from goc_deploy.schedule.operations import schedule_flops
from goc_deploy.spec import ModelSpec
from goc_deploy.version import __version__

FORMAT, VERSION = "goc_deploy.evaluation", 1


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Result of `evaluate`.

    Attributes:
        report: every number, in plain JSON types.
        schedules: plan -> its schedule, for heat maps.
        pictures: plan -> (n, H, W, 1 or 3) uint8 first images, all from the same noise; empty if
            the model has no images.
    """

    report: dict[str, Any]
    schedules: dict[str, Schedule]
    pictures: dict[str, np.ndarray]


def evaluate(engine_dir: Path, options: EvalOptions, progress: Progress) -> Evaluation:
    """Evaluate plans of an engine directory.

    Memory holds features, one number per image and metric, and one batch; never all images.

    Plans of a preset that the engine directory lacks are added to it.

    Raises:
        UsageError: an option, preset, plan, reference, sample file or extractor does not fit.
        EngineDirError: the engine directory is corrupt.
        EnvironmentUnsupportedError: a package is missing.
    """
    _check(options)
    directory, methods = EngineDir.open(engine_dir), dict[str, str]()
    before = {entry.name for entry in directory.manifest.plans}
    scale = cfg_scale_of(options.cfg_scale, directory.manifest.model)
    options = replace(options, cfg_scale=scale)
    if options.preset is not None:
        methods = plans_of_preset(directory, options, progress)
        directory = EngineDir.open(engine_dir)
    manifest = directory.manifest
    names = tuple(methods) or options.plans or [entry.name for entry in manifest.plans]
    plans = [directory.plan(name) for name in names]
    names = [plan.name for plan in plans]  # in place of SPECs
    if len(set(names)) != len(names):
        raise UsageError("a plan is named twice; give each of `plans` once")
    spec = manifest.model
    full = _full_precision(options, manifest, names)
    if full is not None:
        most = min(full.manifest.max_batch, manifest.max_batch)
        options = replace(options, batch_size=options.batch_size or most)
    if options.cfg_channels is None:
        options = replace(options, cfg_channels=spec.guided_channels)
    if spec.video:
        raise UsageError("goc-eval judges images, and this model makes videos")
    files = samples_of_plans(options.samples, names) if options.samples else {}
    labels = _labels(files, options, spec)
    judges = make_judges(options, spec, _image_side(files, manifest), len(labels), progress)
    scores = _rows(plans, full, len(labels))
    machine = collect(engine_dir, files, labels, options, scores, judges.extractor, progress)
    entries = _entries(scores, methods, judges, labels, options, spec, progress)
    report = {
        "format": FORMAT,
        "version": VERSION,
        "goc_deploy": __version__,
        "machine": machine,
        "model": asdict(spec),
        "precision": manifest.precision,
        "provenance": manifest.provenance,
        "images": len(labels),
        "resamples": judges.resamples,
        "features": None if judges.extractor is None else judges.extractor.name,
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(options).items()},
        "warnings": list(judges.warnings),
        "added_plans": [name for name in methods if name not in before],
        "plans": entries,
    }
    schedules = {name: of_plan.plan.schedule for name, of_plan in scores.items()}
    pictures = {name: np.concatenate(s.pictures) for name, s in scores.items() if s.pictures}
    return Evaluation(report, schedules, pictures)


def _check(options: EvalOptions) -> None:
    """Check the options that do not depend on the engine directory.

    Raises:
        UsageError: a number is out of range, or options do not go together.
    """
    if options.seed < 0 or options.num_images < 1:
        raise UsageError(
            f"seed must be 0 or more and images at least 1, got {options.seed} and "
            f"{options.num_images}"
        )
    if options.router is not None and options.preset is None:
        raise UsageError(
            "a router is for a preset; without one name its plan, or give `preset=paper`"
        )


def _rows(plans: Sequence[Plan], full: EngineDir | None, images: int) -> dict[str, PlanScores]:
    """Make an empty row of the report for each plan, then for each plan in full precision."""
    compared_with = baselines(plans)
    name_of = str if full is None else row_of_full  # of the rows that others are compared with
    rows = {
        plan.name: PlanScores(plan, name_of(compared_with[plan.name]), FeatureSet(images))
        for plan in plans
    }
    for plan in () if full is None else [full.plan(plan.name) for plan in plans]:
        baseline = row_of_full(compared_with[plan.name])
        rows[row_of_full(plan.name)] = PlanScores(plan, baseline, FeatureSet(images))
    return rows


def _entries(
    scores: Mapping[str, PlanScores],
    methods: Mapping[str, str],
    judges: Judges,
    labels: np.ndarray,
    options: EvalOptions,
    spec: ModelSpec,
    progress: Progress,
) -> dict[str, Any]:
    """The part of the report about each plan: its cost and its metrics, in plain JSON types."""
    rows, entries = 1 if options.cfg_scale == 1 else 2, {}
    for number, (name, of_plan) in enumerate(scores.items()):
        progress(f"metrics of {name}", number, len(scores))
        estimates = of_plan.paired.estimates(options.seed)
        estimates |= judges.metrics(of_plan.features, labels, spec.choices, options.seed)
        entries[name] = {
            **of_plan.entry(),
            "method": methods.get(name),
            "flops_per_image": schedule_flops(of_plan.plan.schedule, spec, rows),
            "metrics": {key: asdict(value) for key, value in estimates.items()},
        }
    return entries


def _full_precision(
    options: EvalOptions, manifest: Manifest, plans: Sequence[str]
) -> EngineDir | None:
    """Open the directory in full precision, which must have the same model and plans.

    Raises:
        UsageError: it has not, or images are read from files.
    """
    if options.full_precision is None:
        return None
    if options.samples:
        raise UsageError("`full_precision` runs plans, so it does not go with `samples`")
    full = EngineDir.open(options.full_precision)
    if full.manifest.model != manifest.model:
        raise UsageError(
            f"{options.full_precision} holds another model, so its images are no reference; give "
            "the export of the same checkpoint without `quantize`"
        )
    missing = sorted(set(plans) - {entry.name for entry in full.manifest.plans})
    if missing:
        raise UsageError(
            f"{options.full_precision} lacks plan {missing[0]}; add it there, with the same name"
        )
    return full


def _labels(files: dict[str, AdmFile], options: EvalOptions, spec: ModelSpec) -> np.ndarray:
    """Return the labels that the sample files were made for, or new ones."""
    if not files:
        return class_labels(options.labels, options.num_images, spec.choices, options.seed)
    labels = next(iter(files.values())).labels
    assert labels is not None
    return labels


def _image_side(files: dict[str, AdmFile], manifest: Manifest) -> int | None:
    """Return height and width of the images, or None if there are only latents.

    Images from sample files may have been decoded elsewhere.
    """
    size = manifest.image_size
    side = None if size is None else min(size)
    if not files:
        return side
    path, shape = next((file.path, file.shape) for file in files.values())
    assert shape is not None
    if shape[1] != shape[2] or side not in (None, shape[1]):
        expected = f"this model makes {side}x{side}" if side else "expected as high as wide"
        raise UsageError(f"{path} has images of {shape[1]}x{shape[2]}, {expected}")
    return shape[1]
