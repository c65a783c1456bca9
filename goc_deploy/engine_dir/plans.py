"""Finding and reading plans and weights in an engine directory."""

from __future__ import annotations

import shlex
from pathlib import Path

from goc_deploy.compiler import Plan, check_plan
from goc_deploy.compiler.agreement import check_agreement
from goc_deploy.compiler.plan_file import plan_from_json
from goc_deploy.engine_dir.manifest import Manifest, PlanEntry
from goc_deploy.engine_dir.reading import read_verified
from goc_deploy.errors import EngineDirError, UsageError
from goc_deploy.policies.grammar import parse_policy
from goc_deploy.policies.suggestions import closest, meant_spec
from goc_deploy.schedule.schedule import schedule_from_json


def plan_entry(
    manifest: Manifest, name: str | None, directory: Path = Path("ENGINE_DIR")
) -> PlanEntry:
    """The plan of that name or SPEC; without a name the first plan that caches, else the first.

    Args:
        manifest: lists the plans.
        name: name or SPEC, or None.
        directory: what an error calls the engine directory.

    Raises:
        UsageError: there is no such plan.
    """
    if name is not None and not isinstance(name, str):
        raise UsageError(f"a plan is named by its name or SPEC, got {name!r:.60}")
    if not manifest.plans:
        raise EngineDirError(
            f"the engine directory has no plans; add one with: goc plan {shlex.quote(str(directory))} none"
        )
    if name is None:
        return next((entry for entry in manifest.plans if entry.spec != "none"), manifest.plans[0])
    for entry in manifest.plans:
        if name in (entry.name, entry.spec):
            return entry
    default_name = parse_policy(name).default_name
    for entry in manifest.plans:
        if entry.name == default_name:
            return entry
    raise UsageError(f"there is no plan {name!r}; {_hint(directory, manifest, name)}")


def _hint(directory: Path, manifest: Manifest, name: str) -> str:
    """What to do where there is no plan of that name."""
    spec = meant_spec(name)
    if spec is not None:
        return f"add it with: goc plan {shlex.quote(str(directory))} {shlex.quote(spec)}"
    found = closest(name, [word for entry in manifest.plans for word in (entry.name, entry.spec)])
    there = f"this engine has {', '.join(entry.name for entry in manifest.plans)}"
    return f"did you mean {found}? Otherwise {there}" if found else there


def load_plan(directory: Path, manifest: Manifest, name: str | None) -> Plan:
    """Read and check a plan of an engine directory.

    Raises:
        UsageError: no such plan.
        EngineDirError: its files are corrupt or do not fit the model.
    """
    entry = plan_entry(manifest, name, directory)
    files = {file.path: file for file in manifest.files}
    schedule_text, plan_text = (
        bytes(read_verified(directory, files[path])) for path in (entry.schedule, entry.plan)
    )
    try:
        schedule = schedule_from_json(schedule_text, str(directory / entry.schedule))
    except UsageError as cause:
        raise EngineDirError(str(cause)) from cause
    plan = plan_from_json(plan_text, schedule, str(directory / entry.plan))
    if schedule.steps != plan.steps or schedule.units != manifest.model.units:
        raise EngineDirError(
            f"plan {entry.name} and its schedule do not fit together; add the plan again"
        )
    check_plan(plan, manifest.model)
    check_agreement(plan)
    return plan
