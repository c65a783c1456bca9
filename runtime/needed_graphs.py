"""The graphs that plans launch on a backend."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from goc_deploy.compiler import Compute, Plan
from goc_deploy.compiler.modulation_file import CONDITIONING
from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.engine_dir.manifest import GraphEntry, Manifest
from goc_deploy.errors import EngineDirError
from goc_deploy.precision import DTYPE_OF_PRECISION
from goc_deploy.protocols import Backend, Engine
from goc_deploy.spec import SECOND_SET


@dataclass(frozen=True, slots=True)
class NeededGraphs:
    """The graphs to load.

    Attributes:
        units: units and the graphs around the blocks, by name.
        predict: predict graphs, by signature.
        segments: segments, by signature.
        predict_engines: engines of the predict signatures that need no graph.
    """

    units: Mapping[str, GraphEntry]
    predict: Mapping[str, GraphEntry]
    segments: Mapping[str, GraphEntry]
    predict_engines: Mapping[str, Engine]

    @property
    def all(self) -> tuple[GraphEntry, ...]:
        """All graphs."""
        return (*self.units.values(), *self.predict.values(), *self.segments.values())


def needed_graphs(
    directory: EngineDir,
    plans: Sequence[Plan],
    backend: Backend,
    more: Iterable[str] = (),
    predict_engines: Mapping[str, Engine] = MappingProxyType({}),
) -> NeededGraphs:
    """The graphs that plans launch on a backend, and further graphs.

    Args:
        directory: the engine directory.
        plans: the plans; without plans, all units of the blocks are needed.
        backend: the backend.
        more: names of further graphs.
        predict_engines: engines of predict signatures that are loaded already.

    Raises:
        EngineDirError: the manifest does not list a graph.
    """
    manifest, dtype = directory.manifest, DTYPE_OF_PRECISION[directory.manifest.precision]
    signatures = {signature for plan in plans for signature in plan.signatures}
    offered = {
        s: predict_engines[s] if s in predict_engines else backend.predict_engine(s, dtype)
        for s in sorted(signatures)
    }
    predict_engines = {
        signature: engine for signature, engine in offered.items() if engine is not None
    }
    predict = {
        signature: manifest.predict_graph(signature)
        for signature in _listed(directory, manifest.predict, signatures - predict_engines.keys())
    }
    segments = {
        signature: manifest.segment_graph(signature)
        for signature in _listed(
            directory, manifest.segments, [s for plan in plans for s in plan.segment_signatures]
        )
    }
    heads = {plan.sampler.graph for plan in plans if plan.sampler.head is not None}
    needed = {*_unit_names(directory, plans), *more}
    if manifest.model.boundary:
        around = {CONDITIONING, "captions", "references", "embed", "final"}
        needed |= {SECOND_SET + name for name in needed & {*around, *manifest.model.unit_names}}
    lacking = sorted(
        {*needed, *manifest.model.unit_names} - {unit.name for unit in manifest.graphs}
    )
    if lacking:
        raise EngineDirError(
            f"{directory.path} lists no unit {lacking[0]!r}, which the model needs; export again"
        )
    units = {unit.name: unit for unit in manifest.graphs if unit.name in needed}
    units |= {name: manifest.head_graph(name) for name in _listed(directory, manifest.heads, heads)}
    return NeededGraphs(units, predict, segments, predict_engines)


def _unit_names(directory: EngineDir, plans: Sequence[Plan]) -> set[str]:
    """Names of the units and of the graphs around the blocks that plans launch."""
    manifest = directory.manifest
    stored = bool(plans) and all(map(directory.stores_table, plans))
    samplers = {plan.sampler.graph for plan in plans if plan.sampler.head is None}
    needed = {"embed", "final", "modulation", "collect", *_launched_units(manifest, plans)}
    needed |= set() if stored else {CONDITIONING}
    needed |= {"captions"} if manifest.model.text_conditional else set()
    needed |= {"references"} if manifest.model.max_references else set()
    needed |= {"residual"} if any(plan.keeps_residuals for plan in plans) else set()
    return needed | samplers


def _listed(
    directory: EngineDir, graphs: Mapping[str, str], signatures: Iterable[str]
) -> list[str]:
    """The distinct signatures, after checking that the manifest lists their graphs."""
    distinct = sorted(set(signatures))
    missing = [signature for signature in distinct if signature not in graphs]
    if missing:
        raise EngineDirError(
            f"{directory.path} lists no graph for {missing[0]!r}, which a plan needs; "
            "add the plan again"
        )
    return distinct


def _launched_units(manifest: Manifest, plans: Sequence[Plan]) -> Iterable[str]:
    """Units that plans launch outside segments; without plans, all units."""
    names = manifest.model.unit_names
    ops = [op for plan in plans for step in plan.launches for op in step]
    return {names[op.unit] for op in ops if isinstance(op, Compute)} if plans else names
