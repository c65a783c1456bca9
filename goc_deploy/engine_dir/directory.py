"""An open engine directory: its manifest, and the verified way to its files and plans."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from goc_deploy.compiler import Plan, check_plan
from goc_deploy.compiler.agreement import check_agreement
from goc_deploy.compiler.head_file import weights_from_safetensors
from goc_deploy.compiler.modulation_file import table_from_safetensors, table_key
from goc_deploy.compiler.plan_file import plan_from_json
from goc_deploy.engine_dir.manifest import FileEntry, Manifest, PlanEntry
from goc_deploy.engine_dir.reading import read_manifest, read_verified
from goc_deploy.errors import EngineDirError, UsageError
from goc_deploy.policies.grammar import parse_policy
from goc_deploy.policies.suggestions import closest, meant_spec
from goc_deploy.precision import DTYPE_OF_PRECISION
from goc_deploy.schedule.schedule import schedule_from_json


@dataclass(frozen=True, slots=True)
class EngineDir:
    """An open engine directory, which callers hand on instead of opening it again.

    The manifest is that of the moment of opening. Every file is verified against it when the file
    is read. If the directory has changed in between, that is an error; other bytes are never
    returned. `goc_deploy.engine_dir.editing.amended` returns the directory after a change.

    Attributes:
        path: path of the directory.
        manifest: the contents of the directory.
    """

    path: Path
    manifest: Manifest
    _files: Mapping[str, FileEntry] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        files = {file.path: file for file in self.manifest.files}
        object.__setattr__(self, "_files", files)

    @classmethod
    def open(cls, path: Path) -> EngineDir:
        """Read and check the manifest of an engine directory.

        Raises:
            EngineDirError: not an engine directory, or a corrupt one.
            SafetyError: the manifest names files outside the directory.
        """
        return cls(path, read_manifest(path))

    def __contains__(self, path: str) -> bool:
        """Whether the manifest lists a file. All files that the manifest itself uses are listed."""
        return path in self._files

    def file(self, path: str) -> FileEntry:
        """Return the manifest's entry of a file."""
        return self._files[path]

    def size(self, path: str) -> int:
        """Size of a file in bytes according to the manifest."""
        return self._files[path].size

    def sha256(self, path: str) -> str:
        """Hexadecimal digest of a file according to the manifest."""
        return self._files[path].sha256

    def read(self, path: str) -> memoryview:
        """Read a listed file and verify it against the manifest; see `read_verified`.

        Raises:
            EngineDirError: the file is missing, or has another size or digest.
            SafetyError: it is a link, or not a regular file.
        """
        return read_verified(self.path, self._files[path])

    def plan_entry(self, name: str | None) -> PlanEntry:
        """Return the plan of a name or SPEC; None is the first plan that caches, else the first.

        Raises:
            UsageError: there is no such plan.
            EngineDirError: there are no plans.
        """
        if name is not None and not isinstance(name, str):
            raise UsageError(f"a plan is named by its name or SPEC, got {name!r:.60}")
        plans = self.manifest.plans
        if not plans:
            raise EngineDirError(
                "the engine directory has no plans; add one with: "
                f"goc plan {shlex.quote(str(self.path))} none"
            )
        if name is None:
            return next((entry for entry in plans if entry.policy != "none"), plans[0])
        for entry in plans:
            if name in (entry.name, entry.policy):
                return entry
        default_name = parse_policy(name).default_name
        for entry in plans:
            if entry.name == default_name:
                return entry
        raise UsageError(f"there is no plan {name!r}; {self._advice(name)}")

    def _advice(self, name: str) -> str:
        """Suggest what to do if there is no plan of that name."""
        spec = meant_spec(name)
        if spec is not None:
            return f"add it with: goc plan {shlex.quote(str(self.path))} {shlex.quote(spec)}"
        plans = self.manifest.plans
        similar = closest(name, [word for entry in plans for word in (entry.name, entry.policy)])
        there = f"this engine directory has {', '.join(entry.name for entry in plans)}"
        return f"did you mean {similar}? Otherwise {there}" if similar else there

    def plan(self, name: str | None) -> Plan:
        """Read and check a plan.

        Args:
            name: name or SPEC; None is the first plan that caches.

        Raises:
            UsageError: no such plan.
            EngineDirError: its files are corrupt or do not fit the model.
        """
        entry = self.plan_entry(name)
        schedule_text, plan_text = (bytes(self.read(p)) for p in (entry.schedule, entry.plan))
        try:
            schedule = schedule_from_json(schedule_text, str(self.path / entry.schedule))
        except UsageError as cause:
            raise EngineDirError(str(cause)) from cause
        weights = None
        if entry.head is not None:
            weights = weights_from_safetensors(self.read(entry.head), str(self.path / entry.head))
        plan = plan_from_json(plan_text, schedule, str(self.path / entry.plan), weights)
        if schedule.steps != plan.steps or schedule.units != self.manifest.model.units:
            raise EngineDirError(
                f"plan {entry.name} and its schedule do not fit together; add the plan again"
            )
        check_plan(plan, self.manifest.model)
        check_agreement(plan, self.manifest.model)
        return plan

    def plans(self) -> list[Plan]:
        """Read and check every plan, in order of preference.

        Raises:
            EngineDirError: as for `plan`.
        """
        return [self.plan(entry.name) for entry in self.manifest.plans]

    def stores_table(self, plan: Plan) -> bool:
        """Whether the manifest lists a modulation table for the timesteps of a plan."""
        return table_key(plan) in self.manifest.tables

    def table(self, plan: Plan) -> np.ndarray | None:
        """Read and check the modulation table of a plan.

        Returns:
            The table (T, M, D), read-only; uint16 holds bfloat16 values. None if the manifest lists
            no table for the timesteps of the plan.

        Raises:
            EngineDirError: the file is missing or corrupt, or does not fit the plan and the model.
        """
        manifest = self.manifest
        path = manifest.tables.get(table_key(plan))
        if path is None:
            return None
        shape = (plan.steps, manifest.model.modulation.count, manifest.model.hidden)
        dtype, where = DTYPE_OF_PRECISION[manifest.precision], str(self.path / path)
        return table_from_safetensors(self.read(path), shape, dtype, where)
