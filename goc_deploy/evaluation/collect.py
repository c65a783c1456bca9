"""The loop over batches: run every plan, score the images, keep the scores, drop the images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from goc_deploy.compiler import Plan, compile_schedule
from goc_deploy.errors import UsageError
from goc_deploy.evaluation.distribution import READ_IMAGES, FeatureSet
from goc_deploy.evaluation.features import Extractor
from goc_deploy.evaluation.pairing import PairedScores
from goc_deploy.evaluation.sampling import Sampled, SampleWriters, generated, read_back
from goc_deploy.exporters.schedulers import table_from_sampler
from goc_deploy.metrics.paired import relative_l2
from goc_deploy.options import EvalOptions, Progress
from goc_deploy.runtime.adm import AdmFile
from goc_deploy.schedule import COMPUTE, Schedule

if TYPE_CHECKING:
    from goc_deploy.runtime.pipeline import Pipeline

GRID_IMAGES = 12  # images per plan in the report
FULL = "@full"  # ends the name of a row of a plan in full precision
MACHINE_KEYS = ("backend", "version", "provider", "threads", "batch_size")


@dataclass(slots=True)
class PlanScores:
    """Scores of one plan.

    Attributes:
        plan: the plan.
        baseline: name of the row it is compared with, which may be its own.
        features: features of its images.
        paired: comparison with the baseline and the converged solution.
        batch_ms: (images, milliseconds) of every batch.
        pictures: the first images.
    """

    plan: Plan
    baseline: str
    features: FeatureSet
    paired: PairedScores = field(default_factory=PairedScores)
    batch_ms: list[tuple[int, float]] = field(default_factory=list)
    pictures: list[np.ndarray] = field(default_factory=list)

    def entry(self) -> dict[str, Any]:
        """Describe the plan and its cost in plain JSON types."""
        schedule, steps = self.plan.schedule, self.plan.steps
        measured = [
            ms / images for images, ms in (self.batch_ms[1:] or self.batch_ms)
        ]  # the first warms up
        return {
            "policy": schedule.policy,
            "sampler": self.plan.sampler.sampler,
            "steps": steps,
            "baseline": self.baseline,
            "computed_units": schedule.computed,
            "all_units": steps * schedule.units,
            "full_step_equivalents": schedule.computed / schedule.units,
            "ms_per_image": median(measured) if measured else None,
            "step_errors": self.paired.step_errors(),
        }


def collect(
    engine_dir: Path,
    files: Mapping[str, AdmFile],
    labels: np.ndarray,
    options: EvalOptions,
    scores: Mapping[str, PlanScores],
    extractor: Extractor | None,
    progress: Progress,
) -> dict[str, Any]:
    """Fill ``scores`` from the images of ``files`` if there are any, else from generated ones.

    Returns:
        Description of the machine that ran the plans, for people.
    """
    if files:
        for _, sampled in read_back(files, READ_IMAGES, progress):
            _take(scores, sampled, extractor)
        return {"read_from": str(options.samples)}
    machine: dict[str, Any] = {}
    with ExitStack() as stack:
        pipes = _load(stack, engine_dir, _plans_of(scores), options)
        exact = list(pipes.values())
        if options.full_precision is not None:
            full = _load(stack, options.full_precision, _plans_of(scores), options)
            pipes |= {row_of_full(name): pipe for name, pipe in full.items()}
            exact = list(full.values())
        first_pipe = next(iter(pipes.values()))
        converged = converged_pipeline(stack, exact, options)
        height, width = first_pipe.manifest.image_size or first_pipe.spec.sample[-2:]
        writers = stack.enter_context(
            SampleWriters(options.samples_output, list(scores), (len(labels), height, width))
        )
        for first, sampled in generated(pipes, labels, options, progress):
            part = labels[first : first + first_pipe.batch_size]
            writers.add(sampled, part)
            _take(scores, sampled, extractor)
            if converged is not None and first < options.converged_images:
                progress(f"{options.converged} uncached steps", first, options.converged_images)
                _compare_with(converged, scores, sampled, part, first, options)
            machine = machine or {
                key: sampled[first_pipe.plan.name].report[key] for key in MACHINE_KEYS
            }
    return machine


def _load(
    stack: ExitStack, engine_dir: Path, names: list[str], options: EvalOptions
) -> dict[str, Pipeline]:
    from goc_deploy.api.facade import load_plans

    pipes = load_plans(
        engine_dir,
        names,
        backend=options.backend,
        device=options.device,
        batch_size=options.batch_size or None,
        threads=options.threads,
        all_units=options.converged > 0,
    )
    return {name: stack.enter_context(pipe) for name, pipe in zip(names, pipes, strict=True)}


def row_of_full(plan: str) -> str:
    """Name of the row of a plan in full precision, ``PLAN@full``."""
    return f"{plan}{FULL}"


def _plans_of(scores: Mapping[str, PlanScores]) -> list[str]:
    """The plans, without the rows of those in full precision."""
    return [name for name, of_plan in scores.items() if of_plan.plan.name == name]


def converged_pipeline(
    stack: ExitStack, pipes: Sequence[Pipeline], options: EvalOptions
) -> Pipeline | None:
    """Load a pipeline of ``options.converged`` uncached steps, or return None if there are none.

    It has the first plan's sampler and engines.
    """
    if not options.converged:
        return None
    for pipe in pipes:
        if pipe.plan.sampler.stochastic:
            raise UsageError(
                f"`converged` needs deterministic samplers, but plan {pipe.plan.name} "
                f"has {pipe.plan.sampler.sampler}"
            )
    spec = pipes[0].spec
    schedule = Schedule.of(spec, ((COMPUTE,) * spec.units,) * options.converged)
    table = table_from_sampler(
        pipes[0].plan.sampler.sampler, options.converged, pipes[0].manifest.process
    )
    plan = compile_schedule(schedule, spec, table, name="converged")
    return stack.enter_context(pipes[0].with_plan(plan))


def _compare_with(
    converged: Pipeline,
    scores: Mapping[str, PlanScores],
    sampled: Mapping[str, Sampled],
    labels: np.ndarray,
    first: int,
    options: EvalOptions,
) -> None:
    labels = labels[: options.converged_images - first]
    truth = converged.generate(
        labels.tolist(),
        seed=options.seed,
        first_image=first,
        cfg_scale=options.cfg_scale,
        cfg_channels=options.cfg_channels,
        decode=False,
    ).latents
    for name, of_plan in scores.items():
        latents = sampled[name].latents
        assert latents is not None
        of_plan.paired.add_values(
            "converged_relative_l2", relative_l2(latents[: len(truth)], truth)
        )


def _take(
    scores: Mapping[str, PlanScores],
    sampled: Mapping[str, Sampled],
    extractor: Extractor | None,
) -> None:
    for name, of_plan in scores.items():
        batch = sampled[name]
        if of_plan.baseline != name:
            of_plan.paired.add(batch, sampled[of_plan.baseline])
        if batch.images is not None:
            if extractor is not None:
                of_plan.features.add(extractor.extract(batch.images))
            kept = sum(len(part) for part in of_plan.pictures)
            if kept < GRID_IMAGES:
                of_plan.pictures.append(batch.images[: GRID_IMAGES - kept].copy())
        if batch.report:
            of_plan.batch_ms.append((batch.report["images"], batch.report["total_ms"]))
