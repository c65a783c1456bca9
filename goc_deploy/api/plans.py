"""Plans of an engine directory: compiled, added while others read it, or compiled for one load."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from goc_deploy.api.laboratory import EngineLaboratory
from goc_deploy.api.requirements import require
from goc_deploy.compiler import Plan, compile_schedule
from goc_deploy.disk import directory_lock, disk_errors, replacing, scratch_folder
from goc_deploy.engine_dir.manifest import MANIFEST_NAME, Manifest, PlanEntry
from goc_deploy.engine_dir.manifest_file import manifest_to_json
from goc_deploy.engine_dir.plans import load_plan, plan_entry
from goc_deploy.engine_dir.reading import files_below, read_manifest, read_verified
from goc_deploy.errors import CalibrationNeededError, ConflictError, UsageError
from goc_deploy.exporters.schedulers import table_from_sampler
from goc_deploy.options import ExportOptions, PlanOptions, Progress, no_progress
from goc_deploy.policies.calibration import CalibrationOptions, default_images
from goc_deploy.policies.grammar import BASES_WITH_A_PATH, check_plan_name, parse_policy
from goc_deploy.policies.registration import base_named
from goc_deploy.policies.resolve import schedule_from_policy
from goc_deploy.policies.suggestions import meant_spec
from goc_deploy.protocols import Backend
from goc_deploy.samplers import default_sampler
from goc_deploy.spec import ModelSpec

if TYPE_CHECKING:
    from goc_deploy.runtime.loading import UnlistedPlans

DEFAULTS = ExportOptions()


def compiled_plan(
    directory: Path,
    manifest: Manifest,
    spec: str,
    options: PlanOptions,
    make_backend: Callable[[], Backend] | None,
    progress: Progress = no_progress,
) -> Plan:
    """Compile a plan for an engine directory, without a lock: calibration may take minutes.

    Args:
        directory: the engine directory.
        manifest: its manifest.
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
    base = base_named(policy.base[0])
    if options.steps is not None and base is not None and base.chooses_steps:
        raise UsageError(
            f"{policy.base[0]!r} chooses the number of steps; "
            f"use the option ,steps={options.steps} in the SPEC"
        )
    name = check_plan_name(options.name or policy.default_name)
    first = load_plan(directory, manifest, manifest.plans[0].name) if manifest.plans else None
    steps, sampler = options.steps, options.sampler
    if steps is None:
        steps = first.steps if first else DEFAULTS.steps
    if not sampler:
        sampler = first.sampler.sampler if first else default_sampler(manifest.process)
    table_from_sampler(sampler, steps, manifest.process)  # refuses a wrong one before measuring
    laboratory = None
    if make_backend is not None:
        images = _calibration(manifest.model, steps, options)
        laboratory = EngineLaboratory(directory, make_backend, sampler, images, progress)
    schedule = schedule_from_policy(policy, manifest.model, steps, laboratory, _read_router)
    table = table_from_sampler(sampler, schedule.steps, manifest.process)
    return compile_schedule(schedule, manifest.model, table, name=name, segments=options.segments)


def _calibration(spec: ModelSpec, steps: int, options: PlanOptions) -> CalibrationOptions:
    images = options.calibrate
    if images is None:
        images = default_images(spec, steps)
    return CalibrationOptions(images, options.seed, options.cfg_scale, spec.guided_channels)


def _read_router(path: str) -> tuple[tuple[float, ...], ...]:
    from goc_deploy.exporters.router import router_probabilities

    return router_probabilities(path)


def publish_plan(directory: Path, before: Manifest, plan: Plan) -> PlanEntry:
    """Add a plan: its files first, the manifest that lists them last, each in one step.

    Args:
        directory: the engine directory.
        before: the manifest that the plan was compiled for.
        plan: the plan.

    Returns:
        The entry of the plan, or that of an equal plan which is there already.

    Raises:
        ConflictError: another plan has that name, the directory cannot be written, or it was
            replaced meanwhile.
        EngineDirError: the directory is corrupt.
    """
    with directory_lock(directory), disk_errors(f"adding a plan to {directory}"):
        manifest = read_manifest(directory)
        if (manifest.model, manifest.units) != (before.model, before.units):
            raise ConflictError(
                f"{directory} was replaced while the plan was made; add the plan again"
            )
        for entry in manifest.plans:
            if entry.name.lower() == plan.name.lower():
                if load_plan(directory, manifest, entry.name) == plan:
                    return entry
                raise ConflictError(
                    f"{directory} already has another plan named {entry.name}; "
                    "choose another `name`"
                )
        return _add(directory, manifest, plan)


def _add(directory: Path, manifest: Manifest, plan: Plan) -> PlanEntry:
    from goc_deploy.exporters.graphs.plan_files import write_plan

    listed = {file.path: file for file in manifest.files}

    def read(path: str) -> bytes:
        return bytes(read_verified(directory, listed[path]))

    made: list[Path] = []
    try:
        with scratch_folder(directory, ".plan-") as stage:
            manifest = write_plan(stage, plan, manifest, read)
            new = files_below(stage)
            for file in new:
                (directory / file.path).parent.mkdir(exist_ok=True)
                made.append(directory / file.path)
                with replacing(directory / file.path) as temporary:
                    temporary.write_bytes((stage / file.path).read_bytes())
        files = sorted((*manifest.files, *new), key=lambda file: file.path)
        manifest = replace(manifest, files=tuple(files))
        with replacing(directory / MANIFEST_NAME) as temporary:
            temporary.write_text(manifest_to_json(manifest), encoding="utf-8")
    except BaseException:
        for path in made:  # files that no manifest lists
            path.unlink(missing_ok=True)
        raise
    return manifest.plans[-1]


def plan_on_the_fly(
    directory: Path, name: str | None, steps: int | None
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

    manifest = read_manifest(directory)
    try:
        entry = plan_entry(manifest, name, directory)
    except UsageError:
        if not isinstance(name, str) or meant_spec(name) != name:
            raise
        spec, options = name, PlanOptions(steps=steps, segments="none")
    else:
        present = load_plan(directory, manifest, entry.name)
        if steps is None or steps == present.steps:
            return name, None
        if parse_policy(entry.spec).base[0] in BASES_WITH_A_PATH:
            raise UsageError(
                f"plan {entry.name} was made from a file for {present.steps} steps; "
                "give its SPEC with the file's path instead"
            )
        name, spec = entry.name, entry.spec
        options = PlanOptions(name, steps, present.sampler.sampler, segments="none")
    plan = _uncalibrated(directory, manifest, spec, options)
    return name, UnlistedPlans({name: plan}, partial(_predict_graph, manifest))


def _uncalibrated(directory: Path, manifest: Manifest, spec: str, options: PlanOptions) -> Plan:
    try:
        return compiled_plan(directory, manifest, spec, options, None)
    except ModuleNotFoundError as cause:  # of a router that torch saved
        require("export", cause.name or "torch")
        raise
    except CalibrationNeededError as cause:
        steps = "" if options.steps is None else f" --steps {options.steps}"
        command = f"goc plan {shlex.quote(str(directory))} {shlex.quote(spec)}{steps}"
        raise UsageError(
            f"SPEC {spec!r}: it learns from images, so the plan must be added to the engine "
            f"directory first, with: {command}"
        ) from cause


def _predict_graph(manifest: Manifest, signature: str) -> bytes:
    """The ONNX file of a predict signature that the engine directory may lack."""
    require("export", "onnx")
    from goc_deploy.exporters.graphs.cache_update import predict_graph

    graph = predict_graph(signature, manifest.model, manifest.precision)
    content: bytes = graph.SerializeToString()
    return content
