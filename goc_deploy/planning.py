"""Adding a plan to an engine directory that others may be reading."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from goc_deploy.engine_dir import load_plan
from goc_deploy.errors import ConflictError
from goc_deploy.grammar import check_plan_name, parse_policy
from goc_deploy.manifest import MANIFEST_NAME, PlanEntry, manifest_to_json
from goc_deploy.options import ExportOptions
from goc_deploy.passes import compile_schedule
from goc_deploy.policies import schedule_from_policy
from goc_deploy.publish import directory_lock, disk_errors, file_entry, read_manifest, replacing
from goc_deploy.samplers import sampler_table

DEFAULTS = ExportOptions()


def add_plan_to(directory: Path, spec: str, name: str | None, steps: int | None, sampler: str | None) -> PlanEntry:
    """Compile a plan and add it: its files first, the manifest that lists them last, each in one step.

    Raises:
        UsageError, ScheduleError: a wrong SPEC, name, step count or sampler.
        ConflictError: another plan has that name, or the directory cannot be written.
        EngineDirError: the directory is corrupt.
    """
    from goc_deploy.exporters.plan_files import write_plan

    policy = parse_policy(spec)
    name = check_plan_name(name or policy.default_name)
    read_manifest(directory)
    with directory_lock(directory), disk_errors(f"adding a plan to {directory}"):
        manifest = read_manifest(directory)
        first = load_plan(directory, manifest, manifest.plans[0].name) if manifest.plans else None
        steps = steps if steps is not None else first.steps if first else DEFAULTS.steps
        sampler = sampler or (first.sampler.sampler if first else DEFAULTS.sampler)
        table = sampler_table(sampler, steps, manifest.model.prediction)
        schedule = schedule_from_policy(policy, manifest.model, steps)
        plan = compile_schedule(schedule, manifest.model, table, name=name)
        for entry in manifest.plans:
            if entry.name.lower() == name.lower():
                if load_plan(directory, manifest, entry.name) == plan:
                    return entry
                raise ConflictError(f"{directory} already has another plan named {entry.name}; choose another --name")
        with tempfile.TemporaryDirectory(prefix=".plan-", dir=directory) as stage:
            entry, predict = write_plan(Path(stage), plan, manifest.model, manifest.precision, manifest.predict)
            paths = [entry.plan, entry.schedule, *predict.values()]
            new_files = tuple(file_entry(Path(stage), path) for path in paths)
            for path in paths:
                (directory / path).parent.mkdir(exist_ok=True)
                with replacing(directory / path) as temporary:
                    temporary.write_bytes((Path(stage) / path).read_bytes())
        manifest = replace(
            manifest,
            plans=(*manifest.plans, entry),
            predict={**manifest.predict, **predict},
            files=tuple(sorted((*manifest.files, *new_files), key=lambda file: file.path)),
        )
        with replacing(directory / MANIFEST_NAME) as temporary:
            temporary.write_text(manifest_to_json(manifest), encoding="utf-8")
    return entry
