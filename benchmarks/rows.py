"""Rows of docs/results.md: plans, what each computes, and what GOD decided in it."""

from __future__ import annotations

import json
from collections import Counter as Tally
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.roofline import Counter, total
from benchmarks.sampled_rows import Request, Workers
from goc_deploy.compiler import Compute
from goc_deploy.disk import save_text
from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.evaluation.distribution import Reference
from goc_deploy.evaluation.features import Extractor
from goc_deploy.policies.grammar import parse_policy, plan_name_from_spec
from goc_deploy.schedule import Schedule
from goc_deploy.spec import ModelSpec

# B is within 0..1: with a threshold above it every step uses the gradient, with 0 none does.
ALWAYS = 1.0

COST = ("caching level %", "FLOPs (T)", "full steps")


@dataclass(frozen=True, slots=True)
class Row:
    """A plan that the tables show.

    Attributes:
        title: what a reader calls it.
        spec: policy SPEC.
        steps: sampling steps; 0 where the policy chooses them.
        sampler: sampler SPEC.
    """

    title: str
    spec: str
    steps: int = 20
    sampler: str = "ddim"

    @property
    def plan(self) -> str:
        """Its name in the engine directory."""
        steps = f".T{self.steps}" if self.steps else ""
        sampler = "" if self.sampler == "ddim" else f".{plan_name_from_spec(self.sampler)}"
        return f"{parse_policy(self.spec).default_name[:80]}{steps}{sampler}"


@dataclass(frozen=True, slots=True)
class Study:
    """What every row shares.

    Attributes:
        engine: the engine directory.
        work: folder of samples.
        numbers: folder of a JSON file per row.
        request: of no plan in particular.
        workers: how to sample.
        extractor: features for the distribution metrics.
        reference: the images to compare with.
        calibration_images: for plans that learn.
        baseline: the first row, which rows of its steps and sampler are compared with.
        converged: no cache at many steps, of few images.
        converged_images: how many.
        metrics: keys of the only columns to show, or nothing for all.
    """

    engine: Path
    work: Path
    numbers: Path
    request: Request
    workers: Workers
    extractor: Extractor
    reference: Reference
    calibration_images: int
    baseline: Row
    converged: Row
    converged_images: int
    metrics: tuple[str, ...]

    def path(self, row: Row) -> Path:
        """Where a row's numbers are."""
        return self.numbers / f"{row.plan}.json"

    def made_for(self) -> dict[str, Any]:
        """What numbers must have been made for to be shown beside each other."""
        provenance = EngineDir.open(self.engine).manifest.provenance
        return {
            "checkpoint_sha256": provenance["checkpoint_sha256"],
            "images": self.request.images,
            "seed": self.request.seed,
            "cfg_scale": self.request.cfg_scale,
            "features": self.extractor.name,
            "reference_images": self.reference.images,
            "calibration_images": self.calibration_images,
            "converged": [self.converged.steps, self.converged_images],
        }


def contents_of(schedule: Schedule) -> dict[str, Any]:
    """What the tables tell of a schedule, as plain JSON.

    Returns:
        ``steps``; ``computed``, evaluations by branch; of a schedule that GOD decided, ``god``:
        its eta and threshold, the steps with the gradient, and the steps at which only reuse was
        possible otherwise.
    """
    computed = Tally(
        place.branch
        for step in schedule.coefficients
        for place, row in zip(schedule.places, step, strict=True)
        if not row
    )
    found = {
        "steps": schedule.steps,
        "full_step_equivalents": schedule.computed / schedule.units,
        "computed": {branch: computed[branch] for branch in schedule.branches},
    }
    god = schedule.provenance.get("god")
    if god is None:
        return found
    reused = [step for step, rows in enumerate(schedule.coefficients) if any(rows)]
    kept = {key: god[key] for key in ("eta", "threshold", "gradient_steps")}
    return {**found, "god": {**kept, "reused_steps": reused}}


def update_contents(path: Path, schedule: Schedule) -> None:
    """Write the work of a schedule into the numbers of a row, if there are any.

    They were measured with that schedule.
    """
    if path.exists():
        found = {**json.loads(path.read_text(encoding="utf-8")), **contents_of(schedule)}
        save_text(json.dumps(found, indent=1) + "\n", path)


def caching_level(numbers: Mapping[str, Any]) -> float:
    """The share of evaluations that are not computed, in percent."""
    return 100 * (1 - numbers["full_step_equivalents"] / numbers["steps"])


def teraflops_per_image(numbers: Mapping[str, Any], spec: ModelSpec) -> float:
    """Floating point operations of the matrix products, in 10^12, for one image.

    The image is made with guidance.

    A multiplication and an addition are two. Predictions are no matrix products and are left out.
    """
    counter, steps = Counter(spec, 2, 4), numbers["steps"]
    works = [*counter.conditioning(steps, 2), *counter.around(0) * steps]
    for branch, count in numbers["computed"].items():
        works += counter.compute(Compute(spec.branches.index(branch), None)) * count
    return total(works).flops / 1e12


def cost_cells(numbers: Mapping[str, Any], spec: ModelSpec) -> tuple[str, ...]:
    """The columns ``COST`` of a row."""
    flops = f"{teraflops_per_image(numbers, spec):.4f}"
    return f"{caching_level(numbers):.0f}", flops, f"{numbers['full_step_equivalents']:.2f}"


def god_text(god: Mapping[str, Any] | None) -> str:
    """What GOD decided: the strength, and where the gradient is used."""
    if god is None:
        return ""
    if god["threshold"] > ALWAYS:
        where = "everywhere"
    elif god["gradient_steps"]:
        where = (
            f"{len(god['gradient_steps'])} of {len(god['reused_steps'])} cached steps: "
            f"{_ranges(god)}"
        )
    else:
        where = "nowhere"
    return f"eta {god['eta']:g}, {where}"


def _ranges(god: Mapping[str, Any]) -> str:
    """The steps with the gradient; cached steps that follow each other are written as a range."""
    order, parts = god["reused_steps"], [[god["gradient_steps"][0]] * 2]
    for step in god["gradient_steps"][1:]:
        if order.index(step) == order.index(parts[-1][1]) + 1:
            parts[-1][1] = step
        else:
            parts.append([step, step])
    return ", ".join(f"{first}" if first == last else f"{first} to {last}" for first, last in parts)
