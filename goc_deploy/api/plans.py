"""Adding a plan to an engine directory that others may be reading."""

from __future__ import annotations

import shlex
from collections.abc import Callable

from goc_deploy.api.laboratory import engine_laboratory
from goc_deploy.compiler import Plan, compile_schedule
from goc_deploy.disk import scratch_folder
from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.engine_dir.editing import Amendment, amended
from goc_deploy.engine_dir.manifest import PlanEntry
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
    directory: EngineDir,
    spec: str,
    options: PlanOptions,
    make_backend: Callable[[], Backend],
    progress: Progress,
) -> PlanEntry:
    """Compile a plan and add it.

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
    path, before = directory.path, directory.manifest
    plan = _compiled(directory, spec, options, make_backend, progress)

    def change(current: EngineDir) -> Amendment | None:
        manifest = current.manifest
        if (manifest.model, manifest.units) != (before.model, before.units):
            raise ConflictError(f"{path} was replaced while the plan was made; add the plan again")
        present = _named(current, plan.name)
        if present is None:
            return _with_plan(current, plan)
        if current.plan(present.name) == plan:
            return None
        raise ConflictError(
            f"{path} already has another plan named {present.name}; choose another --name"
        )

    after = amended(path, f"adding a plan to {path}", change)
    entry = _named(after, plan.name)
    assert entry is not None
    return entry


def _named(directory: EngineDir, name: str) -> PlanEntry | None:
    """The plan of that name. Upper and lower case count as equal, as on some file systems."""
    plans = directory.manifest.plans
    return next((entry for entry in plans if entry.name.lower() == name.lower()), None)


def _compiled(
    directory: EngineDir,
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
    manifest = directory.manifest
    first = directory.plan(manifest.plans[0].name) if manifest.plans else None
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


def _with_plan(directory: EngineDir, plan: Plan) -> Amendment:
    from goc_deploy.exporters.graphs.plan_files import write_plan

    with scratch_folder(directory.path, ".plan-") as stage:
        manifest = write_plan(
            stage, plan, directory.manifest, lambda path: bytes(directory.read(path))
        )
        written = [path for path in stage.rglob("*") if path.is_file()]
        files = {path.relative_to(stage).as_posix(): path.read_bytes() for path in written}
    return Amendment(manifest, files)


def plan_on_the_fly(
    directory: EngineDir, name: str | None, steps: int | None
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
    try:
        entry = directory.plan_entry(name)
    except UsageError:
        if not isinstance(name, str) or meant_spec(name) != name:
            raise
        return name, _uncalibrated(directory, name, PlanOptions(steps=steps, segments="none"))
    present = directory.plan(entry.name)
    if steps is None or steps == present.steps:
        return None
    if parse_policy(entry.spec).path:
        raise UsageError(
            f"plan {entry.name} was made from a file for {present.steps} steps; give its SPEC with the file's path instead"
        )
    options = PlanOptions(entry.name, steps, present.sampler.sampler, segments="none")
    return entry.name, _uncalibrated(directory, entry.spec, options)


def _uncalibrated(directory: EngineDir, spec: str, options: PlanOptions) -> Plan:
    def no_backend() -> Backend:
        raise CalibrationNeededError("it learns from images")

    try:
        return _compiled(directory, spec, options, no_backend, no_progress)
    except CalibrationNeededError as cause:
        steps = "" if options.steps is None else f" --steps {options.steps}"
        command = f"goc plan {shlex.quote(str(directory.path))} {shlex.quote(spec)}{steps}"
        raise UsageError(
            f"{cause}, so the plan must be added to the engine first, with: {command}"
        ) from cause
