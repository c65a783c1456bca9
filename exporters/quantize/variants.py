"""Units in several formats beside those in the precision, until one format is chosen for each."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from goc_deploy.engine_dir.manifest import GraphEntry, Manifest
from goc_deploy.engine_dir.reading import files_below
from goc_deploy.precision import WeightFormat

FOLDER = "variants"  # of the stage, which is removed at the end

Choice = Mapping[str, WeightFormat]  # unit -> format; other units keep the precision


@dataclass(frozen=True, slots=True)
class Variants:
    """Quantised units of an engine directory that is not yet published.

    Attributes:
        stage: the directory, whose units stay in the precision until `install`.
    """

    stage: Path
    _units: dict[tuple[str, WeightFormat], GraphEntry] = field(default_factory=dict)

    def copy(self, unit: GraphEntry, wanted: WeightFormat) -> Path:
        """Copy the files of a unit in the precision, to be quantised to a format.

        Returns:
            The folder of the copies, ``NAME.onnx`` and ``NAME.weights``.
        """
        folder = self.stage / FOLDER / wanted
        folder.mkdir(parents=True, exist_ok=True)
        assert unit.weights_file is not None
        # The graph names its weights by their file name, so both keep theirs side by side.
        shutil.copyfile(self.stage / unit.onnx, folder / f"{unit.name}.onnx")
        shutil.copyfile(self.stage / unit.weights_file, folder / f"{unit.name}.weights")
        return folder

    def add(self, quantized: GraphEntry) -> None:
        """Add a unit whose copies were quantised; its paths are those of the precision."""
        assert quantized.weight_format is not None
        self._units[quantized.name, quantized.weight_format] = quantized

    def saved_bytes(self) -> dict[str, dict[WeightFormat, int]]:
        """Return how many bytes of weights each unit saves in each format."""
        saved: dict[str, dict[WeightFormat, int]] = {}
        for (name, wanted), unit in self._units.items():
            file = f"{FOLDER}/{wanted}/{name}.weights"
            sizes = [(self.stage / str(path)).stat().st_size for path in (unit.weights_file, file)]
            saved.setdefault(name, {})[wanted] = sizes[0] - sizes[1]
        return saved

    def manifest(self, precise: Manifest, choice: Choice) -> Manifest:
        """Return the manifest of a directory in which some units are quantised.

        Args:
            precise: the manifest in which all units are in the precision, which lists all files of
                the stage.
            choice: the format of each unit that is quantised.
        """
        graphs = tuple(
            replace(
                self._units[unit.name, choice[unit.name]],
                onnx=f"{FOLDER}/{choice[unit.name]}/{unit.name}.onnx",
                weights_file=f"{FOLDER}/{choice[unit.name]}/{unit.name}.weights",
            )
            if unit.name in choice
            else unit
            for unit in precise.graphs
        )
        return replace(precise, graphs=graphs)

    def install(self, precise: Manifest, choice: Choice) -> Manifest:
        """Replace units by their chosen formats, and forget the others.

        Returns:
            The manifest with the chosen units.
        """
        graphs = []
        for unit in precise.graphs:
            if unit.name in choice:
                folder = self.stage / FOLDER / choice[unit.name]
                os.replace(folder / f"{unit.name}.onnx", self.stage / unit.onnx)
                os.replace(folder / f"{unit.name}.weights", self.stage / str(unit.weights_file))
                unit = self._units[unit.name, choice[unit.name]]
            graphs.append(unit)
        shutil.rmtree(self.stage / FOLDER)
        return replace(precise, graphs=tuple(graphs), files=files_below(self.stage))
