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
from goc_deploy.exporters.quantize.originals import Originals
from goc_deploy.options import ExportOptions, Progress
from goc_deploy.policies.calibration import CalibrationOptions, Trials
from goc_deploy.policies.candidates import uncached
from goc_deploy.precision import WeightFormat
from goc_deploy.spec import ModelSpec


def check_bounded(
    options: ExportOptions, spec: ModelSpec, formats: Mapping[str, WeightFormat]
) -> None:
    """Check that ``max_error`` can be measured.

    Raises:
        UsageError: nothing is quantised, or the model or precision cannot run calibration images.
    """
    if not formats:
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


def keep_within(
    bound: float,
    quantized: Manifest,
    originals: Originals,
    plans: Sequence[Plan],
    trials: Callable[[EngineDir], Trials],
    images: CalibrationOptions,
    progress: Progress,
) -> tuple[Manifest, Budget]:
    """Put units back into the precision until all plans are within a bound.

    Args:
        bound: largest error, see `goc_deploy.exporters.quantize.budget.Budget`.
        quantized: manifest in which all units that may be quantised are.
        originals: has these units as they were before.
        plans: the plans.
        trials: makes what runs schedules on an engine directory.
        images: the calibration images.
        progress: called with (what, done, total).

    Returns:
        The manifest with the units that were chosen, and what was measured.

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
    whole = replace(quantized, files=files_below(originals.stage))
    schedules = {plan.name: plan.schedule for plan in plans}
    no_cache = uncached(quantized.model, max(plan.steps for plan in plans))
    loaded: dict[tuple[str, ...], Trials] = {}

    def draw(plan: str | None, units: Sequence[str]) -> np.ndarray:
        if tuple(units) not in loaded:
            loaded.clear()  # one set of engines is in memory at a time
            directory = EngineDir(originals.stage, originals.manifest(whole, units))
            loaded[tuple(units)] = trials(directory)
        schedule = no_cache if plan is None else schedules[plan]
        return loaded[tuple(units)].run(schedule, images).latents

    budget = budget_of(bound, list(schedules), originals.saved_bytes(), draw, progress)
    return originals.restore(quantized, budget.units), budget
