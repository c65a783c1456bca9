"""What is in an engine directory, for people: units, engines, and what a step launches."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from goc_deploy.compiler import Collect, Compute, Plan, Predict, Segment, with_stacks
from goc_deploy.display.plans import Table
from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.engine_dir.manifest import EngineEntry, Manifest


def unit_rows(directory: EngineDir) -> Table:
    """A row per graph: its sizes, its error to PyTorch, and how many engines serve it."""
    manifest = directory.manifest
    served = Counter(graph for engine in manifest.engines for graph in engine.graphs)
    rows = []
    for unit in manifest.units:
        weights = f"{directory.size(unit.weights) / 1e6:.2f}" if unit.weights else ""
        error = f"{unit.relative_l2:.1e}" if unit.relative_l2 is not None else ""
        graph = f"{directory.size(unit.onnx) / 1e3:.1f}"
        rows.append([unit.name, graph, weights, error, str(served[unit.onnx])])
    for kind, graphs in (("predict", manifest.predict), ("segment", manifest.segments)):
        for signature, path in graphs.items():
            graph = f"{directory.size(path) / 1e3:.1f}"
            rows.append([f"{kind} {signature}", graph, "", "", str(served[path])])
    return ["unit", "graph kB", "weights MB", "error to PyTorch", "engines"], rows


def engine_rows(directory: EngineDir, folder: str) -> Table:
    """A row per engine of a target: what it serves, what it takes, and whether its file has the listed size."""
    rows = [
        [
            engine.path.removeprefix(f"{folder}/"),
            engine.weights,
            str(len(engine.graphs)),
            f"{directory.size(engine.path) / 1e6:.2f}",
            "?" if engine.kernels is None else str(engine.kernels),
            str(engine.plugin_layers),
            " | ".join(engine.optima),
            "?" if engine.activation_bytes is None else f"{engine.activation_bytes / 1e6:.1f}",
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


def target_folders(manifest: Manifest) -> list[str]:
    """Folders of the engines, one per target."""
    return sorted({engine.target.folder for engine in manifest.engines})


def _state(path: Path, size: int) -> str:
    try:
        return "there" if os.stat(path).st_size == size else "damaged"
    except OSError:
        return "missing"


def launch_rows(plans: Sequence[Plan], manifest: Manifest) -> Table:
    """A row per plan and kind of step: how many graphs a step launches, and how many kernels these are on each target.

    TensorRT runs a plan with one launch in steps that compute nothing, and with its segments
    (`goc_deploy.compiler.passes.with_stacks`).
    """
    ways = sorted({(e.target.folder, e.weights) for e in manifest.engines if e.weights != "none"})
    rows = []
    for plan in plans:
        stacked = with_stacks(plan, manifest.model)
        kinds: dict[str, int] = {}
        for step in range(1, plan.steps):  # the first also prepares the modulation table
            kinds.setdefault(plan.step_kind(step), step)
        for kind, step in sorted(kinds.items()):
            on_cpu, on_gpu = (launched_graphs(form, manifest, step) for form in (plan, stacked))
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
    """The graphs that a step launches, in order, without the conditioning that the first step of a chunk adds."""
    onnx = {unit.name: unit.onnx for unit in manifest.units}
    ops = plan.launches[step]
    ahead = {op.ahead for op in ops if isinstance(op, Predict) and op.ahead}
    names = [onnx["modulation"]] * (1 + len(ahead)) + [onnx["embed"]]
    for op in ops:
        if isinstance(op, Compute):
            names.append(onnx[manifest.model.unit_names[op.unit]])
        elif isinstance(op, Segment):
            names.append(manifest.segments[op.signature])
        else:
            names.append(
                onnx["collect"] if isinstance(op, Collect) else manifest.predict[op.signature]
            )
    return [*names, onnx["final"], onnx[plan.sampler.graph]]


def _kernels(graphs: Sequence[str], manifest: Manifest, folder: str, weights: str) -> str:
    """Kernels of all graphs on one target, or what is missing to tell."""
    of_graph: dict[str, EngineEntry] = {}
    for engine in manifest.engines:
        if engine.target.folder == folder and engine.weights in (weights, "none"):
            of_graph.update(dict.fromkeys(engine.graphs, engine))
    for (
        engine
    ) in manifest.engines:  # weights that are inputs of the graph itself are so in both ways
        if engine.target.folder == folder:
            for graph in engine.graphs:
                of_graph.setdefault(graph, engine)
    counts = [of_graph[graph].kernels if graph in of_graph else None for graph in graphs]
    known = [count for count in counts if count is not None]
    return (
        str(sum(known))
        if len(known) == len(counts)
        else f"{len(counts) - len(known)} graphs unknown"
    )
