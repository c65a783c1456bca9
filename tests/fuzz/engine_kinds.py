"""Kinds of mutants in an engine directory: those that are accepted are loaded and draw images."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

import goc_deploy
from goc_deploy.api import load_plans
from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.engine_dir.graph_check import check_graph, external_tensors
from goc_deploy.engine_dir.manifest import MANIFEST_NAME, Manifest
from goc_deploy.engine_dir.manifest_file import manifest_to_json
from goc_deploy.engine_dir.reading import file_entry
from goc_deploy.engine_dir.weights import mapped_parts
from goc_deploy.engines.choice import BackendOptions, onnxruntime_backend
from goc_deploy.errors import EngineDirError
from goc_deploy.runtime.loading import load_engines
from goc_deploy.runtime.pipeline import Pipeline
from tests.fuzz.mutations import Mutation, mutated_bytes, mutated_json, mutated_onnx

Trial = Callable[[random.Random], object]
LABELS = (0, -1)  # the first class and the last


def draw(pipe: Pipeline) -> np.ndarray:
    """Latents of two images."""
    classes = pipe.spec.choices
    return pipe.generate([label % classes for label in LABELS], decode=False).latents


class EngineMutants:
    """Mutants of an engine directory.

    Args:
        engine: a sound one, which is not changed.
        folder: where the mutants are.
    """

    def __init__(self, engine: Path, folder: Path) -> None:
        self._engine = engine
        self._manifest = EngineDir.open(engine).manifest
        self._mutant = Path(shutil.copytree(engine, folder / "engine"))
        names = [entry.name for entry in self._manifest.plans]
        pipes = load_plans(engine, names, backend="onnxruntime", batch_size=2, threads=1)
        self._pipes = dict(zip(names, pipes, strict=True))
        self._drawn = draw(self._pipes[names[-1]])
        self._backend = onnxruntime_backend(BackendOptions(threads=1))
        plans = [pipe.plan for pipe in pipes]
        self._engines = load_engines(EngineDir.open(engine), plans, self._backend)
        others = {
            path for entry in self._manifest.plans[:-1] for path in (entry.plan, entry.schedule)
        }
        unused = others | set(self._manifest.segments.values())
        self._used = [file.path for file in self._manifest.files if file.path not in unused]

    def trials(self) -> dict[str, Trial]:
        """Kind of file -> a function that makes a mutant of it and uses it."""
        return {
            "manifest": self._manifest_trial,
            "plan": lambda g: self._plan_trial("plan", g),
            "schedule": lambda g: self._plan_trial("schedule", g),
            "graph": self._graph_trial,
            "engine": self._engine_trial,
        }

    def _changed(self, path: str, mutation: Mutation, generator: random.Random) -> Manifest:
        """The manifest that lists a file of the mutant which was changed."""
        self._write(path, mutation((self._engine / path).read_bytes(), generator))
        files = tuple(
            file_entry(self._mutant, path) if file.path == path else file
            for file in self._manifest.files
        )
        return replace(self._manifest, files=files)

    def _restore(self, *paths: str) -> None:
        for path in paths:
            self._write(path, (self._engine / path).read_bytes())

    def _write(self, path: str, content: bytes) -> None:
        """Replace a file; whoever has it mapped keeps what it was."""
        fresh = self._mutant / ".fresh"
        fresh.write_bytes(content)
        os.replace(fresh, self._mutant / path)

    def _load_and_draw(self) -> np.ndarray:
        name = self._manifest.plans[-1].name
        with goc_deploy.load(
            self._mutant, plan=name, backend="onnxruntime", batch_size=2, threads=1
        ) as pipe:
            return draw(pipe)

    def _manifest_trial(self, generator: random.Random) -> None:
        self._write(
            MANIFEST_NAME, mutated_json((self._engine / MANIFEST_NAME).read_bytes(), generator)
        )
        try:
            self._load_and_draw()
        finally:
            self._restore(MANIFEST_NAME)

    def _plan_trial(self, kind: str, generator: random.Random) -> None:
        """Draw with a plan, on engines that are loaded, if its files are accepted."""
        entry = generator.choice(self._manifest.plans)
        path: str = getattr(entry, kind)
        try:
            manifest = self._changed(path, mutated_json, generator)
            plan = EngineDir(self._mutant, manifest).plan(entry.name)
            if not set(plan.signatures) <= manifest.predict.keys():
                raise EngineDirError("there is no graph for a launch")
            draw(self._pipes[entry.name].with_plan(plan))
        finally:
            self._restore(path)

    def _graph_trial(self, generator: random.Random) -> None:
        """Draw with one graph in place of a sound one, if it is accepted."""
        plan, engines = self._pipes[self._manifest.plans[-1].name].plan, self._engines
        unit = generator.choice(tuple(self._manifest.all_graphs()))
        content = mutated_onnx((self._engine / unit.onnx).read_bytes(), generator)
        parts = self._manifest.parts(unit)
        check_graph(content, external_tensors(parts), unit.onnx)
        directory = EngineDir(self._engine, self._manifest)
        paths = [part.weights_file for part in parts.values() if part.weights_file]
        weights = {path: directory.read(path) for path in paths}
        loaded = self._backend.load(memoryview(content), *mapped_parts(parts, weights))
        if unit.name in engines.units:
            changed = replace(engines, units={**engines.units, unit.name: loaded})
        else:
            signatures = {p: s for s, p in self._manifest.predict.items()}
            found = {signatures[unit.onnx]: loaded} if unit.onnx in signatures else {}
            changed = replace(engines, predict={**engines.predict, **found})
        draw(Pipeline(self._manifest, plan, changed, self._backend, 2, 1))

    def _engine_trial(self, generator: random.Random) -> None:
        """Load and draw with any file of a plan changed.

        Unless the file is listed so, the output may not change.
        """
        path = generator.choice(self._used)
        listed = generator.random() < 0.7
        try:
            manifest = self._changed(path, mutated_bytes, generator)
            if listed:
                self._write(MANIFEST_NAME, manifest_to_json(manifest).encode())
            drawn = self._load_and_draw()
            assert listed or np.array_equal(drawn, self._drawn), f"{path} changed the output"
        finally:
            self._restore(path, MANIFEST_NAME)
