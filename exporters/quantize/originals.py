"""Units as they were before they were quantised, in case they stay so."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path

from goc_deploy.engine_dir.manifest import GraphEntry, Manifest
from goc_deploy.engine_dir.reading import files_below

FOLDER = "originals"  # of the stage, which is removed at the end


@dataclass(frozen=True, slots=True)
class Originals:
    """Keeps files of units of an engine directory that is not yet published.

    Attributes:
        stage: the directory.
    """

    stage: Path
    _kept: dict[str, GraphEntry] = field(default_factory=dict)

    def keep(self, unit: GraphEntry) -> None:
        """Keep the files of a unit, which are about to be replaced."""
        folder = self.stage / FOLDER
        folder.mkdir(exist_ok=True)
        assert unit.weights_file is not None
        # The graph names its weights by their file name, so both keep theirs side by side.
        shutil.copyfile(self.stage / unit.onnx, folder / f"{unit.name}.onnx")
        shutil.copyfile(self.stage / unit.weights_file, folder / f"{unit.name}.weights")
        self._kept[unit.name] = unit

    def saved_bytes(self) -> dict[str, int]:
        """Return how many bytes of weights each unit saves if it is quantised."""
        return {
            name: (self.stage / FOLDER / f"{name}.weights").stat().st_size
            - (self.stage / str(unit.weights_file)).stat().st_size
            for name, unit in self._kept.items()
        }

    def manifest(self, quantized: Manifest, units: Collection[str]) -> Manifest:
        """Return the manifest of a directory in which only some units are quantised.

        Args:
            quantized: the manifest in which all kept units are quantised, which lists all files
                of the stage.
            units: those that are quantised.
        """
        graphs = tuple(
            replace(
                self._kept[unit.name],
                onnx=f"{FOLDER}/{unit.name}.onnx",
                weights_file=f"{FOLDER}/{unit.name}.weights",
            )
            if unit.name in self._kept and unit.name not in units
            else unit
            for unit in quantized.graphs
        )
        return replace(quantized, graphs=graphs)

    def restore(self, quantized: Manifest, units: Collection[str]) -> Manifest:
        """Put back the files of the kept units that are not among some, and forget the others."""
        folder = self.stage / FOLDER
        graphs = []
        for unit in quantized.graphs:
            before = self._kept.get(unit.name)
            if before is not None and unit.name not in units:
                os.replace(folder / f"{unit.name}.onnx", self.stage / before.onnx)
                os.replace(folder / f"{unit.name}.weights", self.stage / str(before.weights_file))
                unit = before
            graphs.append(unit)
        shutil.rmtree(folder)
        return replace(quantized, graphs=tuple(graphs), files=files_below(self.stage))
