"""SmoothCache: steps are reused while features calibrated without cache change little.

Source: Liu et al., "SmoothCache: A Universal Inference Acceleration Technique for Diffusion
Transformers", eq. 4, and the form of its published schedule files: ``{"attn": [1, 0, ...], "mlp":
[...]}``, 1 computes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from goc_deploy.errors import ScheduleError
from goc_deploy.policies.calibration import MAX_GAP
from goc_deploy.policies.context import PolicyContext
from goc_deploy.policies.options import argument, option
from goc_deploy.schedule import COMPUTE, MAX_STEPS, REUSE, Schedule
from goc_deploy.strict_json import bytes_from_file, parse_json

if TYPE_CHECKING:
    import numpy as np

BRANCH_OF_COMPONENT = {
    "attn": "attn",
    "attn1": "attn",
    "attn2": "cross",
    "cross_attn": "cross",
    "mlp": "mlp",
    "ff": "mlp",
}


@dataclass(frozen=True, slots=True)
class SmoothCacheOptions:
    """Options of `smoothcache`."""

    alpha: float | Path = argument(
        "Largest relative change of a feature that is reused, or a schedule file of SmoothCache's.",
        form="ALPHA|FILE.json",
        low=0,
        suffix=".json",
    )
    per_unit: bool = option("Decide for every unit on its own.", default=False)


def smoothcache(options: SmoothCacheOptions, context: PolicyContext) -> Schedule:
    """``smoothcache``: by calibration, or from a schedule file of SmoothCache's.

    After a computed step, the most steps are reused (up to three) whose last one changed by at most
    ALPHA, on average over the blocks of a branch; with ``per_unit`` every unit has its own
    schedule. The last step is computed.
    """
    alpha, spec = options.alpha, context.spec
    if isinstance(alpha, Path):
        return schedule_from_smoothcache(alpha, context)
    calibrator = context.required_laboratory().calibrator(context.steps)
    changes = calibrator.statistics().changes
    if options.per_unit:
        computed = [greedy_steps(changes[:, unit], alpha) for unit in range(spec.units)]
    else:
        of_units = [place.branch for place in spec.unit_places]
        decided = {}
        for branch in spec.branches:
            units = [unit for unit, of_unit in enumerate(of_units) if of_unit == branch]
            decided[branch] = greedy_steps(changes[:, units].mean(axis=1), alpha)
        computed = [decided[branch] for branch in of_units]
    provenance = {
        "alpha": alpha,
        "per_unit": options.per_unit,
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
    """Read a schedule file of SmoothCache's.

    Branches that it does not name are computed at every step.

    Raises:
        ScheduleError: unreadable, of another form, for another number of steps, or for branches the
            model lacks.
    """
    where = f"schedule {path}"
    document = parse_json(bytes_from_file(path, where, ScheduleError), where, ScheduleError)
    spec, steps = context.spec, context.steps
    computed = [[True] * steps for _ in range(spec.units)]
    for component, actions in document.items():
        branch = BRANCH_OF_COMPONENT.get(component)
        if branch not in spec.branches:
            raise ScheduleError(
                f"schedule {path} names {component!r} but the model has {', '.join(spec.branches)}"
            )
        checked = _actions(actions, steps, path, component)
        for unit, place in enumerate(spec.unit_places):
            if place.branch == branch:
                computed[unit] = checked
    return _schedule(computed, context)


def _actions(actions: Any, steps: int, path: Path, component: str) -> list[bool]:
    """Whether each step computes."""
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
            f"schedule {path} has {len(actions)} steps but {steps} are asked for; "
            f"use `steps={len(actions)}`"
        )
    return [bool(action) for action in actions]


def smoothcache_from_schedule(schedule: Schedule) -> str:
    """A schedule as SmoothCache's JSON, which keeps what is computed and nothing else.

    Raises:
        ScheduleError: the units of a branch differ in what they compute, for which the form has no
            words.
    """
    lists: dict[str, list[int]] = {}
    for branch in schedule.branches:
        rows = [
            {
                int(not row)
                for place, row in zip(schedule.places, step, strict=True)
                if place.branch == branch
            }
            for step in schedule.coefficients
        ]
        mixed = next((step for step, actions in enumerate(rows) if len(actions) > 1), None)
        if mixed is not None:
            raise ScheduleError(
                f"step {mixed} computes {branch} in some blocks only, which a SmoothCache file "
                "cannot express; save the schedule itself"
            )
        lists[branch] = [action for actions in rows for action in actions]
    return json.dumps(lists) + "\n"


def _schedule(computed: Sequence[Sequence[bool]], context: PolicyContext) -> Schedule:
    """The schedule whose unit u computes the steps k with ``computed[u][k]``."""
    rows = tuple(
        tuple(COMPUTE if computes else REUSE for computes in step)
        for step in zip(*computed, strict=True)
    )
    return Schedule.of(context.spec, rows)
