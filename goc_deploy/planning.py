"""Adding a plan to an engine directory that others may be reading."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from goc_deploy.calibration import CalibrationOptions, default_images
from goc_deploy.engine_dir import load_plan
from goc_deploy.errors import ConflictError, UsageError
from goc_deploy.grammar import check_plan_name, parse_policy
from goc_deploy.manifest import MANIFEST_NAME, Manifest, PlanEntry, manifest_to_json
from goc_deploy.options import ExportOptions, PlanOptions, Progress
from goc_deploy.passes import compile_schedule
from goc_deploy.plan import Plan
from goc_deploy.policies import schedule_from_policy
from goc_deploy.protocols import Backend
from goc_deploy.publish import directory_lock, disk_errors, files_below, read_manifest, read_verified, replacing
from goc_deploy.registration import base_named
from goc_deploy.samplers import default_sampler, sampler_table
from goc_deploy.trials import engine_laboratory

DEFAULTS = ExportOptions()


def add_plan_to(
    directory: Path, spec: str, options: PlanOptions, make_backend: Callable[[], Backend], progress: Progress
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
            raise ConflictError(f"{directory} was replaced while the plan was made; add the plan again")
        for entry in manifest.plans:
            if entry.name.lower() == plan.name.lower():
                if load_plan(directory, manifest, entry.name) == plan:
                    return entry
                raise ConflictError(f"{directory} already has another plan named {entry.name}; choose another --name")
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
    sampler = options.sampler or (first.sampler.sampler if first else default_sampler(manifest.model.prediction))
    sampler_table(sampler, steps, manifest.model.prediction)  # refuses a wrong one before anything is measured
    images = options.calibrate if options.calibrate is not None else default_images(manifest.model, steps)
    calibration = CalibrationOptions(images, options.seed, options.cfg_scale, manifest.model.guided_channels)

    laboratory = engine_laboratory(directory, make_backend, sampler, calibration, progress)
    schedule = schedule_from_policy(policy, manifest.model, steps, laboratory)
    table = sampler_table(sampler, schedule.steps, manifest.model.prediction)
    return compile_schedule(schedule, manifest.model, table, name=name, segments=options.segments)


def _add(directory: Path, manifest: Manifest, plan: Plan) -> PlanEntry:
    from goc_deploy.exporters.plan_files import write_plan

    listed = {file.path: file for file in manifest.files}

    def read(path: str) -> bytes:
        return bytes(read_verified(directory, listed[path]))

    with tempfile.TemporaryDirectory(prefix=".plan-", dir=directory) as folder:
        stage = Path(folder)
        manifest = write_plan(stage, plan, manifest, read)
        new = files_below(stage)
        for file in new:
            (directory / file.path).parent.mkdir(exist_ok=True)
            with replacing(directory / file.path) as temporary:
                temporary.write_bytes((stage / file.path).read_bytes())
    files = sorted((*manifest.files, *new), key=lambda file: file.path)
    manifest = replace(manifest, files=tuple(files))
    with replacing(directory / MANIFEST_NAME) as temporary:
        temporary.write_text(manifest_to_json(manifest), encoding="utf-8")
    return manifest.plans[-1]
