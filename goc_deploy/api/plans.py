"""Plans of an engine directory: compiled, added while others read it, or compiled for one load."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from goc_deploy.api.engines import cpu_backend
from goc_deploy.api.laboratory import EngineLaboratory
from goc_deploy.api.requirements import require
from goc_deploy.compiler import Plan, compile_schedule
from goc_deploy.disk import scratch_folder
from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.engine_dir.editing import Amendment, amended
from goc_deploy.engine_dir.manifest import Manifest, PlanEntry
from goc_deploy.errors import CalibrationNeededError, ConflictError, UsageError
from goc_deploy.exporters.schedulers import table_from_sampler
from goc_deploy.guidance import cfg_scale_of
from goc_deploy.options import ExportOptions, PlanOptions, Progress, no_progress
from goc_deploy.policies.calibration import CalibrationOptions, default_images
from goc_deploy.policies.grammar import check_plan_name, parse_policy
from goc_deploy.policies.head import with_images
from goc_deploy.policies.registration import base_named
from goc_deploy.policies.resolve import head_from_policy, schedule_from_policy
from goc_deploy.policies.suggestions import meant_spec
from goc_deploy.protocols import Backend
from goc_deploy.samplers import default_sampler
from goc_deploy.spec import ModelSpec

if TYPE_CHECKING:
    from goc_deploy.runtime.loading import UnlistedPlans

DEFAULTS = ExportOptions()
HEAD_CALIBRATES = "a head calibrates, which needs an engine directory; use goc-export or goc-plan"


def compiled_plan(
    directory: EngineDir,
    spec: str,
    options: PlanOptions,
    make_backend: Callable[[], Backend] | None,
    progress: Progress = no_progress,
) -> Plan:
    """Compile a plan for an engine directory, without a lock: calibration may take minutes.

    Args:
        directory: the engine directory.
        spec: policy SPEC.
        options: name, steps, sampler, calibration, segments.
        make_backend: makes the backend that a policy calibrates on; None refuses such policies.
        progress: called with (what, done, total).

    Raises:
        UsageError, ScheduleError: a wrong SPEC, name, step count or sampler.
        CalibrationNeededError: the policy calibrates, and there is no ``make_backend``.
        EngineDirError: the directory is corrupt.
    """
    policy = parse_policy(spec)
    head = head_from_policy(policy)
    base = base_named(policy.base[0])
    if options.steps is not None and base is not None and base.chooses_steps:
        raise UsageError(
            f"{policy.base[0]!r} chooses the number of steps; "
            f"use the option ,steps={options.steps} in the SPEC"
        )
    name = check_plan_name(options.name or policy.default_name)
    manifest = directory.manifest
    first = directory.plan(manifest.plans[0].name) if manifest.plans else None
    steps, sampler = options.steps, options.sampler
    if steps is None:
        steps = first.steps if first else DEFAULTS.steps
    if not sampler:
        sampler = first.sampler.sampler if first else default_sampler(manifest.process)
    table_from_sampler(sampler, steps, manifest.process)  # refuses a wrong one before measuring
    laboratory = None
    if head is not None:
        head = with_images(head, options.calibrate, manifest.model, steps)
        if make_backend is None:
            raise CalibrationNeededError(f"SPEC {spec!r}: {HEAD_CALIBRATES}")
    if make_backend is not None:
        images = _calibration(manifest.model, steps, options)
        full = _full_precision(options, manifest)
        laboratory = EngineLaboratory(directory, make_backend, sampler, images, progress, full)
    schedule = schedule_from_policy(policy, manifest.model, steps, laboratory, _read_router, head)
    table = table_from_sampler(sampler, schedule.steps, manifest.process)
    if head is not None and laboratory is not None:
        schedule, table = laboratory.with_head(schedule, table, head)
    return compile_schedule(schedule, manifest.model, table, name=name, segments=options.segments)


def _calibration(spec: ModelSpec, steps: int, options: PlanOptions) -> CalibrationOptions:
    images = options.calibrate
    if images is None:
        images = default_images(spec, steps)
    scale = cfg_scale_of(options.cfg_scale, spec)
    return CalibrationOptions(images, options.seed, scale, spec.guided_channels)


def _full_precision(options: PlanOptions, manifest: Manifest) -> EngineDir | None:
    """Open the engine directory that calibration is compared with.

    Raises:
        UsageError: it holds another checkpoint.
        EngineDirError: it is corrupt.
    """
    if options.full_precision is None:
        return None
    full = EngineDir.open(options.full_precision)
    same = full.manifest.checkpoint_record == manifest.checkpoint_record
    if full.manifest.model != manifest.model or not same:
        raise UsageError(
            f"{options.full_precision} holds another model, so its images are no reference; give "
            "the export of the same checkpoint without `quantize`"
        )
    return full


def _read_router(path: str) -> tuple[tuple[float, ...], ...]:
    from goc_deploy.exporters.router import router_probabilities

    return router_probabilities(path)


def publish_plan(
    before: EngineDir, plan: Plan, make_backend: Callable[[], Backend] = cpu_backend
) -> PlanEntry:
    """Add a plan.

    Args:
        before: the engine directory as it was when the plan was compiled.
        plan: the plan.
        make_backend: makes the backend that evaluates the modulation of the plan.

    Returns:
        The entry of the plan, or that of an equal plan which is there already.

    Raises:
        ConflictError: another plan has that name, the directory cannot be written, or it was
            replaced meanwhile.
        EngineDirError: the directory is corrupt.
    """
    path, compiled_for = before.path, before.manifest

    def change(current: EngineDir) -> Amendment | None:
        manifest = current.manifest
        if (manifest.model, manifest.graphs) != (compiled_for.model, compiled_for.graphs):
            raise ConflictError(f"{path} was replaced while the plan was made; add the plan again")
        present = _named(current, plan.name)
        if present is None:
            return _with_plan(current, plan, make_backend)
        if current.plan(present.name) == plan:
            return None
        raise ConflictError(
            f"{path} already has another plan named {present.name}; choose another `name`"
        )

    after = amended(path, f"adding a plan to {path}", change)
    entry = _named(after, plan.name)
    assert entry is not None
    return entry


def _named(directory: EngineDir, name: str) -> PlanEntry | None:
    """The plan of that name. Upper and lower case count as equal, as on some file systems."""
    plans = directory.manifest.plans
    return next((entry for entry in plans if entry.name.lower() == name.lower()), None)


def _with_plan(directory: EngineDir, plan: Plan, make_backend: Callable[[], Backend]) -> Amendment:
    from goc_deploy.exporters.graphs.plan_files import write_plan

    with scratch_folder(directory.path, ".plan-") as stage:
        manifest = write_plan(stage, plan, directory.manifest, directory.read, make_backend)
        written = [path for path in stage.rglob("*") if path.is_file()]
        files = {path.relative_to(stage).as_posix(): path.read_bytes() for path in written}
    return Amendment(manifest, files)


def plan_on_the_fly(
    directory: EngineDir, name: str | None, steps: int | None
) -> tuple[str | None, UnlistedPlans | None]:
    """The plan that a name or SPEC asks for, compiled if the engine directory does not hold it.

    Args:
        directory: the engine directory, in which nothing is written.
        name: plan or SPEC; None is the first plan that caches.
        steps: number of sampling steps; None takes that of the plan, or for a SPEC that of the
            directory's first plan.

    Returns:
        The name to load, and the compiled plan of that name, or None if the directory holds it.

    Raises:
        UsageError: no such plan, one that learns from images, or one made from a file whose path is
            not recorded.
        EnvironmentUnsupportedError: a package is missing.
        EngineDirError: the directory is corrupt.
    """
    from goc_deploy.runtime.loading import UnlistedPlans

    try:
        entry = directory.plan_entry(name)
    except UsageError:
        if not isinstance(name, str) or meant_spec(name) != name:
            raise
        spec, options = name, PlanOptions(steps=steps, segments="none")
    else:
        present = directory.plan(entry.name)
        if steps is None or steps == present.steps:
            return name, None
        if parse_policy(entry.policy).path:
            raise UsageError(
                f"plan {entry.name} was made from a file for {present.steps} steps; "
                "give its SPEC with the file's path instead"
            )
        name, spec = entry.name, entry.policy
        options = PlanOptions(name, steps, present.sampler.sampler, segments="none")
    plan = _uncalibrated(directory, spec, options)
    return name, UnlistedPlans({name: plan}, partial(_predict_graph, directory.manifest))


def _uncalibrated(directory: EngineDir, spec: str, options: PlanOptions) -> Plan:
    try:
        return compiled_plan(directory, spec, options, None)
    except ModuleNotFoundError as cause:  # of a router that torch saved
        require("export", cause.name or "torch")
        raise
    except CalibrationNeededError as cause:
        steps = "" if options.steps is None else f" --steps {options.steps}"
        command = f"goc plan {shlex.quote(str(directory.path))} {shlex.quote(spec)}{steps}"
        raise UsageError(
            f"SPEC {spec!r}: it learns from images, so the plan must be added to the engine "
            f"directory first, with: {command}"
        ) from cause


def _predict_graph(manifest: Manifest, signature: str) -> bytes:
    """The ONNX file of a signature whose graph the engine directory may lack."""
    require("export", "onnx")
    from goc_deploy.exporters.graphs.accumulate import graph_of_launch

    graph = graph_of_launch(signature, manifest.model, manifest.precision)
    content: bytes = graph.SerializeToString()
    return content
