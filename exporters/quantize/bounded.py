"""Keeping the error of plans below a bound: measured on the engine directory, unit by unit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from goc_deploy.compiler import Plan
from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.engine_dir.manifest import Manifest
from goc_deploy.engine_dir.reading import files_below
from goc_deploy.errors import UsageError
from goc_deploy.exporters.quantize.budget import Budget, budget_of
from goc_deploy.exporters.quantize.variants import Variants
from goc_deploy.options import ExportOptions, Progress
from goc_deploy.policies.calibration import CalibrationOptions, Trials
from goc_deploy.policies.candidates import uncached
from goc_deploy.precision import WeightFormat
from goc_deploy.spec import ModelSpec


def check_bounded(options: ExportOptions, spec: ModelSpec, units: Sequence[str]) -> None:
    """Check that ``max_error`` can be measured.

    Raises:
        UsageError: nothing is quantised, or the model or precision cannot run calibration images.
    """
    if not units:
        raise UsageError("`max_error` needs `quantize`, and units that it does not exclude")
    if options.precision == "bf16":
        raise UsageError(
            "`max_error` is measured on images, but the CPU has no kernels for bf16; use "
            "`precision=fp32` or fp16"
        )
    if not spec.choices:
        raise UsageError(
            "`max_error` is measured on images, but there are no captions; add `captions`"
        )
    if spec.boundary:
        raise UsageError(
            "`max_error` is not supported for a model with two sets of weights; use "
            "`quantize_exclude`"
        )


def formats_within(
    bound: float,
    precise: Manifest,
    variants: Variants,
    plans: Sequence[Plan],
    trials: Callable[[EngineDir], Trials],
    images: CalibrationOptions,
    progress: Progress,
) -> Budget:
    """Choose the formats of units so that all plans are within a bound.

    Args:
        bound: largest error, see `goc_deploy.exporters.quantize.budget.Budget`.
        precise: manifest in which all units are in the precision.
        variants: the units in the formats that they may have.
        plans: the plans.
        trials: makes what runs schedules on an engine directory.
        images: the calibration images.
        progress: called with (what, done, total).

    Raises:
        UsageError: a plan has a head, which calibration runs do not have.
        VerificationError: the bound cannot be met.
    """
    for plan in plans:
        if plan.sampler.head is not None:
            raise UsageError(
                f"`max_error` cannot be measured for plan {plan.name}, because it has a head; "
                "leave out the head"
            )
    whole = replace(precise, files=files_below(variants.stage))
    schedules = {plan.name: plan.schedule for plan in plans}
    no_cache = uncached(precise.model, max(plan.steps for plan in plans))
    loaded: dict[tuple[tuple[str, WeightFormat], ...], Trials] = {}

    def draw(plan: str | None, formats: Mapping[str, WeightFormat]) -> np.ndarray:
        key = tuple(formats.items())
        if key not in loaded:
            loaded.clear()  # one set of engines is in memory at a time
            loaded[key] = trials(EngineDir(variants.stage, variants.manifest(whole, formats)))
        schedule = no_cache if plan is None else schedules[plan]
        return loaded[key].run(schedule, images).latents

    return budget_of(bound, list(schedules), variants.saved_bytes(), draw, progress)
