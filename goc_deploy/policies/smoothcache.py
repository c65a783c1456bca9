"""SmoothCache: steps are reused while features calibrated without cache change little.

Source: Liu et al., "SmoothCache: A Universal Inference Acceleration Technique for Diffusion Transformers", eq. 4, and
the form of its published schedule files: ``{"attn": [1, 0, ...], "mlp": [...]}``, 1 computes.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from goc_deploy.errors import ScheduleError, UsageError
from goc_deploy.policies.calibration import MAX_GAP
from goc_deploy.policies.context import PolicyContext
from goc_deploy.policies.grammar import number
from goc_deploy.schedule import COMPUTE, MAX_STEPS, REUSE, Schedule
from goc_deploy.strict_json import bytes_from_file, parse_json

BRANCH_OF_COMPONENT = {
    "attn": "attn",
    "attn1": "attn",
    "attn2": "cross",
    "cross_attn": "cross",
    "mlp": "mlp",
    "ff": "mlp",
}


def smoothcache(argument: str, context: PolicyContext) -> Schedule:
    """``smoothcache:ALPHA`` calibrates; ``smoothcache:FILE.json`` reads a schedule file of SmoothCache's.

    After a computed step, the most steps are reused (up to three) whose last one changed by at most ALPHA, on average
    over the blocks of a branch; with ``per_unit`` every unit has its own schedule. The last step is computed.
    """
    if argument.endswith(".json"):
        return schedule_from_smoothcache(Path(argument), context)
    alpha = number(argument, "alpha")
    if alpha < 0:
        raise UsageError(f"alpha {argument} must not be negative")
    calibrator, spec = context.engine().calibrator(context.steps), context.spec
    changes = calibrator.statistics().changes
    if "per_unit" not in context.options:
        branches = len(spec.branches)
        per_branch = changes.reshape(len(changes), spec.depth, branches, MAX_GAP).mean(axis=1)
        changes = np.tile(per_branch, (1, spec.depth, 1))
    computed = np.array([greedy_steps(changes[:, unit], alpha) for unit in range(spec.units)]).T
    provenance = {
        "alpha": alpha,
        "per_unit": "per_unit" in context.options,
        "calibration": calibrator.describe(),
    }
    return replace(_schedule(computed, context), provenance={"smoothcache": provenance})


def greedy_steps(changes: np.ndarray, alpha: float) -> list[bool]:
    """Which steps to compute.

    Args:
        changes: (T, MAX_GAP) change of step k to step k - j, for j = 1 .. MAX_GAP.
        alpha: most change to accept.
    """
    steps = len(changes)
    computed = [False] * steps
    step = 0
    while step < steps:
        computed[step] = True
        gaps = (
            j
            for j in range(MAX_GAP, 0, -1)
            if step + j < steps and changes[step + j, j - 1] <= alpha
        )
        step += 1 + next(gaps, 0)
    computed[-1] = True
    return computed


def schedule_from_smoothcache(path: Path, context: PolicyContext) -> Schedule:
    """Read a schedule file of SmoothCache's; branches that it does not name are computed at every step.

    Raises:
        ScheduleError: unreadable, of another form, for another number of steps, or for branches the model lacks.
    """
    where = f"schedule {path}"
    found = parse_json(bytes_from_file(path, where, ScheduleError), where, ScheduleError)
    spec, steps = context.spec, context.steps
    computed = np.ones((steps, spec.units), bool)
    for component, actions in found.items():
        branch = BRANCH_OF_COMPONENT.get(component)
        if branch not in spec.branches:
            raise ScheduleError(
                f"schedule {path} names {component!r} but the model has {', '.join(spec.branches)}"
            )
        computed[:, spec.branches.index(branch) :: len(spec.branches)] = _actions(
            actions, steps, path, component
        )[:, None]
    return _schedule(computed, context)


def _actions(actions: Any, steps: int, path: Path, component: str) -> np.ndarray:
    if (
        not isinstance(actions, list)
        or len(actions) > MAX_STEPS
        or any(action not in (0, 1) for action in actions)
    ):
        raise ScheduleError(
            f"schedule {path}: {component} must be a list of 0 (reuse) and 1 (compute)"
        )
    if len(actions) != steps:
        raise ScheduleError(
            f"schedule {path} has {len(actions)} steps but {steps} are asked for; use `steps={len(actions)}`"
        )
    return np.array(actions, bool)


def smoothcache_from_schedule(schedule: Schedule) -> str:
    """A schedule as SmoothCache's JSON, which keeps what is computed and nothing else.

    Raises:
        ScheduleError: the units of a branch differ in what they compute, which the form cannot say.
    """
    lists: dict[str, list[int]] = {}
    for index, branch in enumerate(schedule.branches):
        rows = [
            {int(not row) for row in step[index :: len(schedule.branches)]}
            for step in schedule.coefficients
        ]
        mixed = next((step for step, actions in enumerate(rows) if len(actions) > 1), None)
        if mixed is not None:
            raise ScheduleError(
                f"step {mixed} computes {branch} in some blocks only, which a SmoothCache file cannot say; save the schedule itself"
            )
        lists[branch] = [action for actions in rows for action in actions]
    return json.dumps(lists) + "\n"


def _schedule(computed: np.ndarray, context: PolicyContext) -> Schedule:
    rows = tuple(tuple(COMPUTE if c else REUSE for c in step) for step in computed)
    return Schedule(context.spec.depth, context.spec.branches, rows)
