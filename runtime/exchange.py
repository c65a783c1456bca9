"""Exchanging the weights of loaded engines: after all checks, for all engines or for none.

The graphs must be identical byte for byte, because the engines were made from them. The decoder of
a VAE and a text encoder do not belong to the model and are not changed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.engine_dir.manifest import GraphEntry, Manifest
from goc_deploy.engine_dir.weights import mapped_parts
from goc_deploy.errors import UsageError
from goc_deploy.host_memory import return_free_pages
from goc_deploy.protocols import Backend, Engine
from goc_deploy.runtime.model_engines import Engines
from goc_deploy.runtime.request import Batch
from goc_deploy.runtime.session import Session
from goc_deploy.runtime.weights import Weights

logger = logging.getLogger(__name__)

DECODERS = ("decoder", "video_decoder")
SHOWN_DIFFERENCES = 5


@dataclass(frozen=True, slots=True)
class _Graph:
    """A loaded graph with weights.

    Attributes:
        engines: the engines of the same kind.
        key: key of the engine in ``engines``.
        onnx: path of the graph.
        parts: the graphs whose weights it contains, by prefix.
    """

    engines: MutableMapping[str, Engine]
    key: str
    onnx: str
    parts: Mapping[str, GraphEntry]


def load_weights(path: Path, engines: Engines, backend: Backend) -> None:
    """See `goc_deploy.runtime.pipeline.Pipeline.load_weights`."""
    weights = engines.weights
    with weights.exchange():
        if weights.directory is None:
            raise UsageError(
                "these engines come from no engine directory, so their weights cannot be exchanged"
            )
        graphs = list(_graphs(weights.directory.manifest, engines))
        parts = {part.name: part for graph in graphs for part in graph.parts.values()}
        other = EngineDir.open(path)
        _check(path, list(_differences(weights.directory, other, parts)))
        for graph in graphs:
            names = {
                prefix + p.name for prefix, part in graph.parts.items() for p in part.parameters
            }
            backend.check_replaceable(graph.engines[graph.key], names)
        content = {**weights.content, **_verified(other, parts)}
        tables = {} if engines.tables is None else engines.tables.of(other)
        with weights.alone():
            _Exchange(backend, weights).run(graphs, content)
            if engines.tables is not None:
                engines.tables.exchange(other, tables)
            for session in weights.sessions:
                session.forget_table()
            weights.content, weights.checkpoint_sha256 = (
                content,
                other.manifest.provenance.get("checkpoint_sha256"),
            )
    logger.info("the weights of %s are in use now", path)


def _check(path: Path, differences: Sequence[str]) -> None:
    if differences:
        rest = len(differences) - SHOWN_DIFFERENCES
        more = f" and {rest} more" if rest > 0 else ""
        raise UsageError(
            f"the weights of {path} do not fit the engines that are loaded: "
            f"{'; '.join(differences[:SHOWN_DIFFERENCES])}{more}; "
            "load that directory by itself, or export its checkpoint with the same options and "
            "version"
        )


class _Exchange:
    """Exchanges the weights of engines, or restores them."""

    def __init__(self, backend: Backend, weights: Weights) -> None:
        self._backend, self._weights = backend, weights
        self._unbound: dict[Session, tuple[Batch, ...]] = {}

    def run(self, graphs: Sequence[_Graph], content: Mapping[str, memoryview]) -> None:
        """Exchange the weights of all graphs, or of none if one fails."""
        weights, touched = self._weights, list[_Graph]()
        try:
            for graph in graphs:
                touched.append(graph)
                self._give(graph, content)
            self._bind()
        except BaseException:
            try:
                for graph in touched:
                    self._give(graph, weights.content)
                self._bind()
            except BaseException as cause:
                weights.lost = (
                    f"weights could neither be exchanged nor restored ({cause}); "
                    "load the engine directory again"
                )
                raise
            raise

    def _give(self, graph: _Graph, content: Mapping[str, memoryview]) -> None:
        initializers, inputs = mapped_parts(graph.parts, content)
        # The engine is missing if loading it failed in the exchange that is being undone.
        engine = graph.engines.get(graph.key)
        if engine is None or not self._backend.replace_weights(engine, initializers, inputs):
            del engine
            self._unbind()
            # Drop the old engine before loading the new one, so that memory never has both.
            graph.engines.pop(graph.key, None)
            graph.engines[graph.key] = self._backend.load(content[graph.onnx], initializers, inputs)
        return_free_pages(
            content[part.weights_file] for part in graph.parts.values() if part.weights_file
        )

    def _bind(self) -> None:
        """Bind the shapes that were bound before, so that a failure happens here."""
        for session, batches in self._unbound.items():
            session.bind_all(batches)

    def _unbind(self) -> None:
        """Unbind all sessions, because a bound engine cannot be freed."""
        for session in self._weights.sessions:
            self._unbound[session] = session.unbind() or self._unbound.get(session, ())


def _graphs(manifest: Manifest, engines: Engines) -> Iterator[_Graph]:
    units = {unit.name: unit for unit in manifest.graphs}
    units |= {name: manifest.head_graph(name) for name in manifest.heads}
    for kind, unit_of in (
        (engines.units, units.__getitem__),
        (engines.segments, manifest.segment_graph),
    ):
        for key in kind:
            unit = unit_of(key)
            is_companion = key in DECODERS or key in manifest.text_encoders
            parts = {} if is_companion else manifest.parts(unit)
            if parts:
                yield _Graph(kind, key, unit.onnx, parts)


def _differences(
    own: EngineDir, other: EngineDir, parts: Mapping[str, GraphEntry]
) -> Iterator[str]:
    """Differences of another engine directory: in the model, or in graphs and parameters."""
    manifest, precision = own.manifest, other.manifest.precision
    if precision != manifest.precision:
        yield f"precision {precision} instead of {manifest.precision}"
    mine, theirs = asdict(manifest.model), asdict(other.manifest.model)
    if manifest.model.text_conditional:
        del mine["choices"], theirs["choices"]  # the number of stored captions
    yield from (
        f"{name} {theirs[name]} instead of {value}"
        for name, value in mine.items()
        if theirs[name] != value
    )
    units = {unit.name: unit for unit in other.manifest.graphs}
    for name, unit in parts.items():
        twin = units.get(name)
        if twin is None:
            yield f"no unit {name}"
        elif other.sha256(twin.onnx) != own.sha256(unit.onnx):
            yield f"unit {name} is another graph"
        elif (twin.parameters, twin.precision) != (unit.parameters, unit.precision):
            yield f"unit {name} has other parameters"


def _verified(other: EngineDir, parts: Mapping[str, GraphEntry]) -> dict[str, memoryview]:
    """Read and verify other weights, by the path of those that they replace."""
    units = {unit.name: unit for unit in other.manifest.graphs}

    def verified(unit: GraphEntry) -> memoryview:
        path = units[unit.name].weights_file
        assert path is not None  # it has parameters
        content = other.read(path)
        return_free_pages([content])
        return content

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        contents = pool.map(verified, parts.values())
        return {
            str(unit.weights_file): content
            for unit, content in zip(parts.values(), contents, strict=True)
        }
