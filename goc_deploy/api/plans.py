"""Adding a plan to an engine directory that others may be reading."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from goc_deploy.api.laboratory import engine_laboratory
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
from goc_deploy.policies.grammar import check_plan_name, parse_policy
from goc_deploy.policies.registration import base_named
from goc_deploy.policies.resolve import schedule_from_policy
from goc_deploy.policies.suggestions import meant_spec
from goc_deploy.protocols import Backend
from goc_deploy.samplers import default_sampler

DEFAULTS = ExportOptions()


def add_plan_to(
    directory: Path,
    spec: str,
    options: PlanOptions,
    make_backend: Callable[[], Backend],
    progress: Progress,
) -> PlanEntry:
    """Compile a plan and add it: its files first, the manifest that lists them last, each in one step.

    Args:
        directory: the engine directory.
        spec: policy SPEC.
        options: name, steps, sampler, calibration, segments.
        make_backend: runs the engine for policies that calibrate, and is called by no other.
        progress: called with (what, done, total).

    Raises:
        UsageError, ScheduleError: a wrong SPEC, name, step count or sampler.
        ConflictError: another plan has that name, the directory cannot be written, or it was replaced meanwhile.
        EngineDirError: the directory is corrupt.
    """
    before = read_manifest(directory)
    plan = _compiled(directory, before, spec, options, make_backend, progress)
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
                    f"{directory} already has another plan named {entry.name}; choose another --name"
                )
        return _add(directory, manifest, plan)


def _compiled(
    directory: Path,
    manifest: Manifest,
    spec: str,
    options: PlanOptions,
    make_backend: Callable[[], Backend],
    progress: Progress,
) -> Plan:
    """The plan, for a directory that nobody needs to lock: calibration may take minutes."""
    policy = parse_policy(spec)
    base = base_named(policy.base[0])
    if options.steps is not None and base is not None and base.chooses_steps:
        raise UsageError(
            f"{policy.base[0]!r} chooses the number of steps; use the option ,steps={options.steps} in the SPEC"
        )
    name = check_plan_name(options.name or policy.default_name)
    first = load_plan(directory, manifest, manifest.plans[0].name) if manifest.plans else None
    steps = options.steps if options.steps is not None else first.steps if first else DEFAULTS.steps
    sampler = options.sampler or (
        first.sampler.sampler if first else default_sampler(manifest.process)
    )
    table_from_sampler(
        sampler, steps, manifest.process
    )  # refuses a wrong one before anything is measured
    images = (
        options.calibrate
        if options.calibrate is not None
        else default_images(manifest.model, steps)
    )
    calibration = CalibrationOptions(
        images, options.seed, options.cfg_scale, manifest.model.guided_channels
    )

    laboratory = engine_laboratory(directory, make_backend, sampler, calibration, progress)
    schedule = schedule_from_policy(policy, manifest.model, steps, laboratory, _read_router)
    table = table_from_sampler(sampler, schedule.steps, manifest.process)
    return compile_schedule(schedule, manifest.model, table, name=name, segments=options.segments)


def _read_router(path: str) -> tuple[tuple[float, ...], ...]:
    from goc_deploy.exporters.router import router_probabilities

    return router_probabilities(path)


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
) -> tuple[str, Plan] | None:
    """The plan that a name or SPEC asks for where the engine directory does not hold it, and what to call it.

    Args:
        directory: the engine directory, in which nothing is written.
        name: plan or SPEC; None is the first plan that caches.
        steps: sampling steps; None takes those of the plan, or of the engine's first plan.

    Returns:
        None if the directory holds the plan.

    Raises:
        UsageError: no such plan, one that learns from images, or one made from a file that is not known any more.
        EngineDirError: the directory is corrupt.
    """
    manifest = read_manifest(directory)
    try:
        entry = plan_entry(manifest, name, directory)
    except UsageError:
        if not isinstance(name, str) or meant_spec(name) != name:
            raise
        return name, _uncalibrated(
            directory, manifest, name, PlanOptions(steps=steps, segments="none")
        )
    present = load_plan(directory, manifest, entry.name)
    if steps is None or steps == present.steps:
        return None
    if parse_policy(entry.spec).path:
        raise UsageError(
            f"plan {entry.name} was made from a file for {present.steps} steps; give its SPEC with the file's path instead"
        )
    options = PlanOptions(entry.name, steps, present.sampler.sampler, segments="none")
    return entry.name, _uncalibrated(directory, manifest, entry.spec, options)


def _uncalibrated(directory: Path, manifest: Manifest, spec: str, options: PlanOptions) -> Plan:
    def no_backend() -> Backend:
        raise CalibrationNeededError("it learns from images")

    try:
        return _compiled(directory, manifest, spec, options, no_backend, no_progress)
    except CalibrationNeededError as cause:
        steps = "" if options.steps is None else f" --steps {options.steps}"
        command = f"goc plan {shlex.quote(str(directory))} {shlex.quote(spec)}{steps}"
        raise UsageError(
            f"{cause}, so the plan must be added to the engine first, with: {command}"
        ) from cause
