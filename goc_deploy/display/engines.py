"""Tables of an engine directory: units, engines, and the launches of a step."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from goc_deploy.compiler import Accumulate, Compute, Plan, Predict, Residual, Segment, in_form
from goc_deploy.compiler.cache_ops import taps_from_signature
from goc_deploy.compiler.plan import StepKind
from goc_deploy.display.plans import Table
from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.engine_dir.keys import EngineWeightMode
from goc_deploy.engine_dir.manifest import EngineEntry, Manifest


def graph_rows(directory: EngineDir) -> Table:
    """Make a row per graph: its sizes, its error compared with PyTorch, and its engines.

    Stored modulation tables follow.
    """
    manifest = directory.manifest
    served = Counter(graph for engine in manifest.engines for graph in engine.graphs)
    rows = []
    for unit in manifest.graphs:
        weights = f"{directory.size(unit.weights_file) / 1e6:.2f}" if unit.weights_file else ""
        error = f"{unit.relative_l2:.1e}" if unit.relative_l2 is not None else ""
        graph = f"{directory.size(unit.onnx) / 1e3:.1f}"
        stored = (unit.weight_format or unit.precision) if weights else ""
        rows.append([unit.name, graph, weights, stored, error, str(served[unit.onnx])])
    for kind, graphs in (("predict", manifest.predict), ("segment", manifest.segments)):
        for signature, path in graphs.items():
            graph = f"{directory.size(path) / 1e3:.1f}"
            kind = kind if taps_from_signature(signature) is None else "accumulate"
            rows.append([f"{kind} {signature}", graph, "", "", "", str(served[path])])
    for name, path in manifest.heads.items():
        rows.append([name, f"{directory.size(path) / 1e3:.1f}", "", "", "", str(served[path])])
    for key, path in manifest.tables.items():
        size = f"{directory.size(path) / 1e6:.2f}"
        rows.append([f"modulation table {key[:12]}", "", size, manifest.precision, "", ""])
    return ["unit", "graph kB", "weights MB", "format", "error to PyTorch", "engines"], rows


def budget_rows(manifest: Manifest) -> tuple[str, Table] | None:
    """Make a title and a row per unit of what ``max_error`` measured, or None without it."""
    budget = manifest.provenance.get("quantization", {}).get("budget")
    if budget is None:
        return None
    totals = ", ".join(
        f"{plan} {error:.3g} (without quantization {budget['cached'][plan]:.3g})"
        for plan, error in budget["total"].items()
    )
    title = f"quantization, bound {budget['bound']:.3g}: {totals}"
    formats = {unit.name: unit.weight_format or unit.precision for unit in manifest.graphs}
    tried = list(dict.fromkeys(wanted for errors in budget["alone"].values() for wanted in errors))
    rows = [
        [unit, *(f"{errors[wanted]:.1e}" for wanted in tried), formats[unit]]
        for unit, errors in budget["alone"].items()
    ]
    alone = [f"alone in {wanted}, plan {budget['judge']}" for wanted in tried]
    return title, (["unit", *alone, "format"], rows)


def engine_rows(directory: EngineDir, folder: str) -> Table:
    """Make a row per engine of a target: its graphs, its memory, and the state of its file."""
    rows = [
        [
            engine.path.removeprefix(f"{folder}/"),
            engine.weight_mode,
            str(len(engine.graphs)),
            f"{directory.size(engine.path) / 1e6:.2f}",
            "?" if engine.kernels is None else str(engine.kernels),
            str(engine.plugin_layers),
            " | ".join(engine.optima),
            "?" if engine.scratch_bytes is None else f"{engine.scratch_bytes / 1e6:.1f}",
            _state(directory.path / engine.path, directory.size(engine.path)),
        ]
        for engine in directory.manifest.engines
        if engine.target.folder == folder
    ]
    return [
        "engine",
        "weights",
        "graphs",
        "MB",
        "kernels",
        "of plugin",
        "profiles for",
        "scratch MB",
        "file",
    ], rows


def lora_rows(manifest: Manifest) -> Table:
    """Make a row per LoRA that was merged into the weights."""
    rows = [
        [
            lora.file,
            f"{lora.scale:g}",
            lora.alpha_source,
            ", ".join(map(str, lora.ranks)),
            str(lora.layers),
            lora.sha256[:12],
        ]
        for lora in manifest.loras
    ]
    return ["file", "scale", "alpha from", "ranks", "layers", "SHA-256"], rows


def target_folders(manifest: Manifest) -> list[str]:
    """Return the folders of the engines, one per target."""
    return sorted({engine.target.folder for engine in manifest.engines})


def _state(path: Path, size: int) -> str:
    try:
        return "there" if os.stat(path).st_size == size else "damaged"
    except OSError:
        return "missing"


def launch_rows(plans: Sequence[Plan], manifest: Manifest) -> Table:
    """Make a row per plan and kind of step: launched graphs, and kernels on each target.

    TensorRT runs the device form of a plan (`goc_deploy.compiler.forms.in_form`).
    """
    ways = sorted(
        {(e.target.folder, e.weight_mode) for e in manifest.engines if e.weight_mode != "none"}
    )
    rows = []
    for plan in plans:
        on_device = in_form(plan, manifest.model, "device")
        kinds: dict[StepKind, int] = {}
        for step in range(1, plan.steps):  # step 0 also prepares the modulation table
            kinds.setdefault(plan.step_kind(step), step)
        for kind, step in sorted(kinds.items()):
            on_cpu, on_gpu = (launched_graphs(form, manifest, step) for form in (plan, on_device))
            kernels = [_kernels(on_gpu, manifest, folder, weights) for folder, weights in ways]
            rows.append(
                [
                    plan.name,
                    kind,
                    str(plan.kind_counts[kind]),
                    str(len(on_cpu)),
                    str(len(on_gpu)),
                    *kernels,
                ]
            )
    names = [f"{folder.removeprefix('engines/')} {weights}: kernels" for folder, weights in ways]
    return ["plan", "kind of step", "steps", "graphs per step", "on TensorRT", *names], rows


def launched_graphs(plan: Plan, manifest: Manifest, step: int) -> list[str]:
    """Return the graphs that a step launches, in order.

    The conditioning, which the first step of a chunk also launches, is not included.
    """
    onnx = {unit.name: unit.onnx for unit in manifest.graphs}
    ops = plan.launches[step]
    names = [onnx["modulation"]] * (1 + len(plan.targets(step))) + [onnx["embed"]]
    for op in ops:
        if isinstance(op, Compute):
            names.append(onnx[manifest.model.unit_names[op.unit]])
        elif isinstance(op, Segment):
            names.append(manifest.segments[op.signature])
        elif isinstance(op, Predict | Accumulate):
            names.append(manifest.predict[op.signature])
        else:
            names.append(onnx["residual" if isinstance(op, Residual) else "collect"])
    return [*names, onnx["final"], (onnx | manifest.heads)[plan.sampler.graph]]


def _kernels(
    graphs: Sequence[str], manifest: Manifest, folder: str, weights: EngineWeightMode
) -> str:
    """Count the kernels of all graphs on one target, or explain why they cannot be counted."""
    of_graph: dict[str, EngineEntry] = {}
    for engine in manifest.engines:
        if engine.target.folder == folder and engine.weight_mode in (weights, "none"):
            of_graph.update(dict.fromkeys(engine.graphs, engine))
    # Weights that are inputs of the exported graph are inputs in both weight modes.
    for engine in manifest.engines:
        if engine.target.folder == folder:
            for graph in engine.graphs:
                of_graph.setdefault(graph, engine)
    counts = [of_graph[graph].kernels if graph in of_graph else None for graph in graphs]
    reported = [count for count in counts if count is not None]
    return (
        str(sum(reported))
        if len(reported) == len(counts)
        else f"{len(counts) - len(reported)} graphs unknown"
    )
