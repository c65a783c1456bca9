"""The modulation tables that an engine directory stores, and those of timesteps that it does not.

A session takes the whole table of its plan from here, so that the graph ``conditioning`` is not
loaded. If the timesteps depend on the size of a sample, the tables of other sizes than those stored
are computed when they are first needed: the graph is loaded, run and freed again.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence

import numpy as np

from goc_deploy.compiler import Plan
from goc_deploy.compiler.modulation_file import steps_by_graph, table_key
from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.engine_dir.manifest import GraphEntry
from goc_deploy.errors import EngineDirError
from goc_deploy.host_memory import return_free_pages
from goc_deploy.protocols import Backend, Buffer, Engine, Stream, stored_values
from goc_deploy.runtime.text_loading import load_graph

logger = logging.getLogger(__name__)

MAX_COMPUTED = 8  # tables in host memory; as many shapes of a batch are kept bound


class ModulationTables:
    """The tables of plans that were loaded from an engine directory.

    Args:
        directory: the engine directory.
        plans: the loaded plans.
        backend: runs the graph for timesteps that are not stored.
        engines: engines by name; the graph is taken from there if it is loaded for another plan.

    Raises:
        EngineDirError, SafetyError: a table is missing or corrupt.
    """

    def __init__(
        self,
        directory: EngineDir,
        plans: Sequence[Plan],
        backend: Backend,
        engines: Mapping[str, Engine],
    ) -> None:
        self._directory, self._plans, self._backend, self._engines = (
            directory,
            [plan for plan in plans if directory.stores_table(plan)],
            backend,
            engines,
        )
        self._keys = {table_key(plan) for plan in self._plans}
        self._stored = self._read(directory)
        for plan in self._plans:
            path = directory.manifest.tables[table_key(plan)]
            logger.info("plan %s takes its modulation from %s", plan.name, directory.path / path)
        self._computed: OrderedDict[str, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()  # sessions wait for a table that another one computes

    def holds(self, plan: Plan) -> bool:
        """Whether the sessions of a plan take its table from here."""
        return table_key(plan) in self._keys

    def fill(self, plan: Plan, target: Buffer, stream: Stream) -> None:
        """Put the table of a plan, or of the plan for another size of samples, on a stream.

        Args:
            plan: the plan, with the timesteps of the size.
            target: (T, M, 1, D), overwritten.
            stream: the stream of the session.

        Raises:
            EngineDirError, SafetyError: no table is stored, and the graph is missing or corrupt.
            ResourceError: there is not enough memory for the graph.
        """
        key = table_key(plan)
        with self._lock:
            table = self._stored.get(key)
            if table is None and key in self._computed:
                table = self._computed[key]
                self._computed.move_to_end(key)
            if table is None:
                table = self._directory.table(plan)
            if table is None:
                self._compute(plan, target, stream)
                self._keep(key, stored_values(stream.download(target), target.dtype))
                return
        stream.upload(table.reshape(target.shape), target)

    def of(self, directory: EngineDir) -> dict[str, np.ndarray]:
        """The stored tables of a directory with other weights, for `exchange`.

        Raises:
            EngineDirError, SafetyError: a table of a loaded plan is corrupt, or neither it nor the
                graph is there.
        """
        missing = [plan for plan in self._plans if not directory.stores_table(plan)]
        for name in {name for plan in missing for name in steps_by_graph(plan)}:
            for path in _files(self._unit(directory, name)):
                return_free_pages([directory.read(path)])
        return self._read(directory)

    def exchange(self, directory: EngineDir, tables: dict[str, np.ndarray]) -> None:
        """Take all tables from another directory; ``tables`` are its stored ones."""
        self._directory, self._stored = directory, tables
        self._computed.clear()

    def _read(self, directory: EngineDir) -> dict[str, np.ndarray]:
        """The stored tables of the loaded plans, by key."""
        plans = {table_key(plan): plan for plan in self._plans}
        tables = {key: directory.table(plan) for key, plan in plans.items()}
        return {key: table for key, table in tables.items() if table is not None}

    def _keep(self, key: str, table: np.ndarray) -> None:
        """Keep a computed table for later changes of the size."""
        self._computed[key] = table
        if len(self._computed) > MAX_COMPUTED:
            self._computed.popitem(last=False)

    def _compute(self, plan: Plan, target: Buffer, stream: Stream) -> None:
        """Load the graphs of a table, run them, and free them."""
        started = time.perf_counter()
        steps, *row = target.shape
        for name, part in steps_by_graph(plan).items():
            told = np.array([plan.sampler.timesteps[step] for step in part], np.float32)
            timesteps = self._backend.allocate(told.shape, "float32")
            stream.upload(told, timesteps)
            table = target.view(len(part), *row, start=part.start * math.prod(row))
            engine = self._engine(name)
            engine.bind({"timesteps": timesteps}, {"table": table}, stream)()
            stream.wait()  # before the engine is freed
            del engine
        logger.warning(
            "plan %s: %s stores no modulation for the %d timesteps of this size, so the graph that "
            "computes it was loaded and run, which took %.1f s; sizes with as many tokens as the "
            "usual one need no graph",
            plan.name,
            self._directory.path,
            steps,
            time.perf_counter() - started,
        )

    def _engine(self, name: str) -> Engine:
        """The engine of a graph: the loaded one, or one that the caller frees."""
        if name in self._engines:
            return self._engines[name]
        unit = self._unit(self._directory, name)
        content = {path: self._directory.read(path) for path in _files(unit)}
        try:
            return load_graph(self._directory, unit, content, self._backend)
        finally:
            return_free_pages(content.values())

    @staticmethod
    def _unit(directory: EngineDir, name: str) -> GraphEntry:
        """The entry of a graph.

        Raises:
            EngineDirError: there is none.
        """
        for unit in directory.manifest.graphs:
            if unit.name == name:
                return unit
        raise EngineDirError(
            f"{directory.path} lists no unit {name!r}, which the model needs; export again"
        )


def _files(unit: GraphEntry) -> tuple[str, ...]:
    return (unit.onnx, unit.weights_file) if unit.weights_file else (unit.onnx,)
