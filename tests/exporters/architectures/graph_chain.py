"""Exported graphs of a model that reads captions, run one after the other without a runtime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort
from torch import Tensor

from goc_deploy.engine_dir.manifest import GraphEntry
from goc_deploy.engines.ort import OrtBackend
from goc_deploy.exporters.architectures.contract import Architecture
from goc_deploy.exporters.unit_files import UnitWriter
from goc_deploy.options import no_progress
from goc_deploy.size_inputs import size_tensors
from goc_deploy.spec import ModelSpec

Arrays = dict[str, np.ndarray]


class GraphChain:
    """The graphs of a model in float32.

    Args:
        architecture: the family.
        spec: the model.
        tensors: its checkpoint, in the public layout.
        folder: folder to write the graphs to.
    """

    def __init__(
        self,
        architecture: Architecture,
        spec: ModelSpec,
        tensors: Mapping[str, Tensor],
        folder: Path,
    ) -> None:
        self.spec, self._folder = spec, folder
        architecture.check_tensors(tensors, spec)
        writer = UnitWriter(folder, OrtBackend(), no_progress)
        self.entries = writer.write(architecture.graph_kinds(spec, "fp32"), tensors, "fp32")
        self._graphs = {entry.name: self._loaded(entry) for entry in self.entries}

    def _loaded(self, entry: GraphEntry) -> tuple[ort.InferenceSession, Arrays]:
        options = ort.SessionOptions()
        options.use_per_session_threads = False  # `OrtBackend` has made the global threads
        session = ort.InferenceSession(self._folder / entry.onnx, options)
        weights: Arrays = {}
        if entry.weights_are_inputs:
            assert entry.weights_file is not None
            stored = np.fromfile(self._folder / entry.weights_file, np.uint8)
            for parameter in entry.parameters:
                stop = parameter.offset + 4 * int(np.prod(parameter.shape))
                values = stored[parameter.offset : stop].view(np.float32)
                weights[parameter.name] = values.reshape(parameter.shape)
        return session, weights

    def run(self, name: str, offered: Arrays) -> Arrays:
        """Run a graph on those of the offered arrays that it reads."""
        session, weights = self._graphs[name]
        offered = {**offered, **weights}
        read = {i.name: offered[i.name] for i in session.get_inputs()}
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, read), strict=True))

    def step(
        self,
        latents: np.ndarray,
        timestep: float,
        conditions: Arrays,
        caption_rows: np.ndarray | None = None,
    ) -> dict[str, Arrays]:
        """One computed step, row i of the batch with image i.

        Args:
            latents: (B, C, H, W) float32, or (B, C, F, H, W) of videos.
            timestep: what the model is told.
            conditions: ``captions`` (K, L, C), ``pooled`` (K, P) and so on.
            caption_rows: (B,) the caption of each row; None if row i has caption i.

        Returns:
            The outputs of every graph, and the gates of every unit.
        """
        spec = self.spec.at(self.spec.axes_of(latents.shape[1:]))
        rows = np.arange(len(latents))
        captions = rows if caption_rows is None else caption_rows
        offered = {**conditions, **size_tensors(spec), "rows": rows, "caption_rows": captions}
        offered["timesteps"] = np.array([timestep], np.float32)
        patches = latents.reshape(spec.in_patches(latents.shape)) if spec.any_size else latents
        found = {
            "conditioning": self.run("conditioning", offered),
            "captions": self.run("captions", offered),
            "embed": self.run("embed", {**offered, "latents": patches}),
        }
        table = found["conditioning"]["table"][0]  # (M, K or 1, D)
        assert len(table) == spec.modulation.count
        if table.shape[1] == 1:
            table = np.broadcast_to(table, (table.shape[0], len(rows), table.shape[2]))
        else:
            table = table[:, captions]
        x = found["embed"]["x"].reshape(len(rows), spec.tokens, spec.hidden)
        streams = {"x": x}
        if spec.has_text_stream:
            streams["text"] = found["captions"]["text"]
        for unit, name in enumerate(spec.unit_names):
            modulation = {n: table[row] for n, row in spec.modulation.of_unit(unit).items()}
            if not spec.has_text_stream:
                of_block = found["captions"]["keys_values"][2 * spec.unit_places[unit].block :]
                offered |= {"keys": of_block[0], "values": of_block[1]}
            outputs = self.run(name, {**offered, **streams, **modulation})
            streams = {n: outputs.get(f"{n}_out", values) for n, values in streams.items()}
            found[name] = {**modulation, **outputs}
        shift, scale = table[spec.modulation.final_shift], table[spec.modulation.final_scale]
        x = streams["x"]
        x = x.reshape(len(rows), *spec.axes, spec.hidden) if spec.any_size else x
        given = {"shift": np.ascontiguousarray(shift), "scale": np.ascontiguousarray(scale)}
        prediction = self.run("final", {"x": x, **given})["prediction"]
        shape = (len(rows), spec.output_channels, *latents.shape[2:])
        found["final"] = {**given, "x": x, "prediction": prediction.reshape(shape)}
        return found

    def collapsed(self, found: dict[str, Arrays]) -> np.ndarray:
        """The prediction of `step` from embedding and features of the image, in float64."""
        embedded = found["embed"]["x"].astype(np.float64)
        x = embedded.reshape(len(embedded), -1, self.spec.hidden)  # (B, T, D)
        for place in self.spec.features:
            if place.feature.stream == "image":
                unit = found[self.spec.unit_names[place.unit]]
                gate = unit[place.feature.gate][:, None].astype(np.float64)
                x = x + gate * unit[place.feature.output].reshape(x.shape)
        given = {**found["final"], "x": x.astype(np.float32).reshape(found["final"]["x"].shape)}
        prediction = self.run("final", given)["prediction"]
        return prediction.reshape(found["final"]["prediction"].shape)
