"""Writing a plan into an engine directory, with its schedule and graphs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import onnx

from goc_deploy.compiler import Plan, Segment, in_form
from goc_deploy.compiler.head_file import head_to_safetensors
from goc_deploy.compiler.plan_file import plan_to_json
from goc_deploy.engine_dir.manifest import Manifest, PlanEntry
from goc_deploy.errors import UsageError
from goc_deploy.exporters.graphs.accumulate import graph_of_launch
from goc_deploy.exporters.graphs.modulation import Read, write_table
from goc_deploy.exporters.graphs.segments import segment_graph
from goc_deploy.exporters.graphs.step import head_graph
from goc_deploy.protocols import Backend
from goc_deploy.schedule.schedule import schedule_to_json


def write_plan(
    folder: Path,
    plan: Plan,
    manifest: Manifest,
    read: Read,
    make_backend: Callable[[], Backend],
) -> Manifest:
    """Write a plan, its modulation table, and those graphs of all its forms that are missing.

    These are predict and accumulate graphs, segments, and the sampler graph of a head.

    Args:
        folder: folder to write to.
        plan: the plan.
        manifest: manifest of the engine directory.
        read: returns the content of a file of the engine directory.
        make_backend: makes the backend that evaluates the table, if there is one to evaluate.

    Returns:
        The manifest with the plan, the table and these graphs; its list of files is unchanged.

    Raises:
        EngineDirError: a file of the engine directory is missing or corrupt.
    """
    for name in ("plans", "schedules", "onnx"):
        (folder / name).mkdir(exist_ok=True)
    entry = _write_files(folder, plan)
    on_device = in_form(plan, manifest.model, "device")
    forms = [plan, on_device]
    with suppress(UsageError):  # some plans have no such form, and loading reports why
        forms.append(in_form(plan, manifest.model, "sums"))
    return replace(
        write_table(folder, plan, manifest, read, make_backend),
        plans=(*manifest.plans, entry),
        predict=_write_predict_graphs(folder, forms, manifest),
        segments=_write_segments(folder, on_device, manifest, read),
        heads=_write_head_graph(folder, plan, manifest),
    )


def _write_files(folder: Path, plan: Plan) -> PlanEntry:
    """Write a plan, its schedule and the weights of its head."""
    head = plan.sampler.head
    entry = PlanEntry(
        plan.name,
        plan.schedule.policy,
        f"plans/{plan.name}.json",
        f"schedules/{plan.name}.json",
        None if head is None else f"plans/{plan.name}.head.safetensors",
    )
    if entry.head is not None and head is not None:
        (folder / entry.head).write_bytes(head_to_safetensors(head))
    (folder / entry.plan).write_text(plan_to_json(plan), encoding="utf-8")
    (folder / entry.schedule).write_text(schedule_to_json(plan.schedule), encoding="utf-8")
    return entry


def _write_predict_graphs(
    folder: Path, forms: Sequence[Plan], manifest: Manifest
) -> dict[str, str]:
    """Write the missing predict and accumulate graphs; returns all paths by signature."""
    predict = dict(manifest.predict)
    signatures = {signature for form in forms for signature in form.signatures}
    for signature in sorted(signatures - predict.keys()):
        predict[signature] = _path("predict", signature)
        graph = graph_of_launch(signature, manifest.model, manifest.precision)
        onnx.save_model(graph, folder / predict[signature])
    return predict


def _write_segments(folder: Path, plan: Plan, manifest: Manifest, read: Read) -> dict[str, str]:
    """Write the missing segments of a plan in the device form; returns all paths by signature."""
    segments, spec = dict(manifest.segments), manifest.model
    launched = {
        op.signature: op for step in plan.launches for op in step if isinstance(op, Segment)
    }
    for signature in sorted(launched.keys() - segments.keys()):
        paths = {unit.name: unit.onnx for unit in manifest.graphs}
        units = {
            name: onnx.load_model_from_string(bytes(read(paths[name]))) for name in spec.unit_names
        }
        outputs = [
            f"{name}.{feature.output}"
            for name, unit in zip(units, spec.declared_units, strict=True)
            for feature in unit.features
        ]
        stores = zip(outputs, launched[signature].stores, strict=True)
        kept = {output for output, store in stores if store is not None}
        segments[signature] = _path("segment", signature)
        onnx.save_model(segment_graph(units, kept), folder / segments[signature])
    return segments


def _write_head_graph(folder: Path, plan: Plan, manifest: Manifest) -> dict[str, str]:
    """Write the sampler graph of a head if it is missing; returns all paths by name."""
    heads, table = dict(manifest.heads), plan.sampler
    if table.head is not None and table.graph not in heads:
        heads[table.graph] = f"onnx/{table.graph}.onnx"
        graph = head_graph(manifest.model, manifest.precision, table)
        onnx.save_model(graph, folder / heads[table.graph])
    return heads


def _path(kind: str, signature: str) -> str:
    return f"onnx/{kind}_{hashlib.sha256(signature.encode()).hexdigest()[:12]}.onnx"
