"""Writing plans into an engine directory: plan, schedule, and the predict graphs that the plan launches."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import onnx

from goc_deploy.exporters.cache_update import predict_graph
from goc_deploy.manifest import PlanEntry
from goc_deploy.passes import with_stacks
from goc_deploy.plan import Plan
from goc_deploy.serde import plan_to_json, schedule_to_json
from goc_deploy.spec import ModelSpec


def write_plan(
    folder: Path, plan: Plan, spec: ModelSpec, precision: str, known: Mapping[str, str]
) -> tuple[PlanEntry, dict[str, str]]:
    """Write a plan and the predict graphs that are not there yet, of both forms in which it may run.

    Args:
        folder: the engine directory (or its stage).
        plan: what to write.
        spec: the model.
        precision: of the engine.
        known: predict signature -> path of the graphs that are there.

    Returns:
        The plan's manifest entry, and signature -> path of the new graphs.
    """
    for name in ("plans", "schedules", "onnx"):
        (folder / name).mkdir(exist_ok=True)
    entry = PlanEntry(plan.name, plan.schedule.policy, f"plans/{plan.name}.json", f"schedules/{plan.name}.json")
    (folder / entry.plan).write_text(plan_to_json(plan), encoding="utf-8")
    (folder / entry.schedule).write_text(schedule_to_json(plan.schedule), encoding="utf-8")
    new = {}
    for signature in sorted({*plan.signatures, *with_stacks(plan, spec).signatures}):
        if signature not in known:
            new[signature] = f"onnx/predict_{hashlib.sha256(signature.encode()).hexdigest()[:12]}.onnx"
            onnx.save_model(predict_graph(signature, spec, precision), folder / new[signature])
    return entry, new
