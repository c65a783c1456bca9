"""Plans as JSON."""

from __future__ import annotations

from dataclasses import asdict
from operator import index
from typing import Any

from goc_deploy.compiler.plan import (
    Collect,
    Compute,
    Launch,
    Plan,
    Predict,
    Prediction,
    Segment,
)
from goc_deploy.errors import EngineDirError
from goc_deploy.options import SEGMENTS
from goc_deploy.samplers import SamplerTable
from goc_deploy.schedule import Schedule
from goc_deploy.strict_json import build, check_format, dump_json, parse_json

PLAN_FORMAT, PLAN_VERSION = "goc_deploy.plan", 3


def plan_to_json(plan: Plan) -> str:
    """A plan as JSON.

    Launches are lists: ``["c", unit, slot]`` computes, ``["p", unit, [[slots, coefficients, slot], ...], ahead]``
    predicts, ``["a", ahead]`` adds an accumulator.
    """
    return dump_json(
        {
            "format": PLAN_FORMAT,
            "version": PLAN_VERSION,
            "name": plan.name,
            "segments": plan.segments,
            "slots": plan.slots,
            "sampler": _sampler_to_fields(plan.sampler),
            "launches": [[_launch_to_list(op) for op in step] for step in plan.launches],
        },
        indent=None,
    )


def _sampler_to_fields(table: SamplerTable) -> dict[str, Any]:
    fields = asdict(table)
    if table.start == 1:  # as in files that were written before there was a start
        del fields["start"]
    return fields


def _launch_to_list(op: Launch) -> list[Any]:
    if isinstance(op, Compute):
        return ["c", op.unit, op.store]
    if isinstance(op, Collect):
        return ["a", op.ahead]
    assert not isinstance(op, Segment), "a plan is written in the host's form"
    return [
        "p",
        op.unit,
        [[list(p.slots), list(p.coefficients), p.store] for p in op.predictions],
        op.ahead,
    ]


def plan_from_json(text: bytes, schedule: Schedule, where: str) -> Plan:
    """Read a plan; ``schedule`` is what it was compiled from.

    Raises:
        EngineDirError: not JSON or another format. `check_plan` says whether it is safe to execute.
    """
    found = parse_json(text, where, EngineDirError)
    check_format(found, PLAN_FORMAT, PLAN_VERSION, where, EngineDirError)

    def make() -> Plan:
        sampler = _sampler_from_fields(found["sampler"])
        launches = tuple(tuple(_launch_from_list(op) for op in step) for step in found["launches"])
        segments = found.get("segments", "none")
        if segments not in SEGMENTS:
            raise ValueError(f"unknown segments {segments!r}")
        return Plan(
            str(found["name"]), sampler, launches, index(found["slots"]), schedule, segments
        )

    plan: Plan = build(make, where, EngineDirError)
    return plan


def _sampler_from_fields(table: dict[str, Any]) -> SamplerTable:
    numbers = {
        key: tuple(float(v) for v in table[key]) for key in ("latent", "model", "noise", "spread")
    }
    return SamplerTable(
        sampler=str(table["sampler"]),
        prediction=str(table["prediction"]),
        timesteps=tuple(t if isinstance(t, int) else float(t) for t in table["timesteps"]),
        estimate=tuple((float(of_x), float(of_m)) for of_x, of_m in table["estimate"]),
        history=tuple(tuple(float(w) for w in row) for row in table["history"]),
        start=float(table.get("start", 1)),
        **numbers,
    )


def _launch_from_list(op: list[Any]) -> Launch:
    if op[0] == "c":
        return Compute(index(op[1]), _slot(op[2]))
    if op[0] == "a":
        return Collect(index(op[1]))
    if op[0] != "p":
        raise ValueError(f"unknown launch {op[0]!r}")
    rows = (
        Prediction(tuple(index(s) for s in p[0]), tuple(float(c) for c in p[1]), _slot(p[2]))
        for p in op[2]
    )
    return Predict(index(op[1]), tuple(rows), index(op[3]))


def _slot(value: Any) -> int | None:
    return None if value is None else index(value)
