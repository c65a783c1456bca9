"""The graphs of a model with two streams, run one after the other without the runtime."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnxruntime
from torch import Tensor

from goc_deploy.api.engines import cpu_backend
from goc_deploy.engine_dir.manifest import GraphEntry
from goc_deploy.exporters.architectures.contract import Architecture
from goc_deploy.exporters.unit_files import UnitWriter
from goc_deploy.options import no_progress
from goc_deploy.size_inputs import size_tensors
from goc_deploy.spec import ModelSpec

Arrays = dict[str, np.ndarray]


@dataclass
class Result:
    """What a chain of graphs computed.

    Attributes:
        prediction: (B, C_out, H, W).
        first: the tokens before the blocks, (B, T, D).
        last: the tokens behind them.
        features: unit name and output name -> (B*T, D), or (B*L, D) of the text.
        gates: the same names -> (B, D).
    """

    prediction: np.ndarray
    first: np.ndarray
    last: np.ndarray
    features: Arrays = field(default_factory=dict)
    gates: Arrays = field(default_factory=dict)


class GraphChain:
    """The written graphs of a model, as float32 sessions of ONNX Runtime."""

    def __init__(
        self, folder: Path, family: Architecture, tensors: Mapping[str, Tensor], spec: ModelSpec
    ) -> None:
        self.spec, self._folder = spec, folder
        writer = UnitWriter(folder, cpu_backend(), no_progress)
        self.entries = {
            entry.name: entry
            for entry in writer.write(family.graph_kinds(spec, "fp32"), tensors, "fp32")
        }
        options = onnxruntime.SessionOptions()
        options.use_per_session_threads = False  # the backend has made a pool for all sessions
        self._sessions = {
            name: onnxruntime.InferenceSession(folder / entry.onnx, options)
            for name, entry in self.entries.items()
        }
        self._weights = {
            name: self._read(entry)
            for name, entry in self.entries.items()
            if entry.weights_are_inputs
        }

    def run(
        self,
        grid: tuple[int, int],
        latents: np.ndarray,
        timestep: float,
        of_captions: Arrays,
        caption_rows: np.ndarray,
        **shared: np.ndarray,
    ) -> Result:
        """Run the model once.

        Args:
            grid: tokens per row and column.
            latents: (B, C, H, W) float32.
            timestep: the same for all rows.
            of_captions: ``captions`` (K, L, C), and ``pooled`` (K, P) if the model reads it.
            caption_rows: (B,) int64, the caption of each row.
            shared: further inputs that any graph may read.
        """
        spec = self.spec.at(grid)
        rows = np.arange(len(latents))
        given = {**shared, **of_captions, **size_tensors(spec), "caption_rows": caption_rows}
        given["timesteps"] = np.array([timestep], np.float32)
        table = self._outputs("conditioning", given)["table"][0]  # (M, K or 1, D)
        table = np.repeat(table, len(latents), 1) if table.shape[1] == 1 else table[:, caption_rows]
        given["text"] = self._outputs("captions", given)["text"]
        patches = latents.reshape(spec.in_patches(latents.shape))
        embedded = self._outputs("embed", {**given, "latents": patches, "rows": rows})["x"]
        given["x"] = embedded.reshape(len(latents), -1, spec.hidden)
        result = Result(embedded, given["x"], given["x"])
        for unit, name in enumerate(spec.unit_names):
            of_unit = {row: table[i] for row, i in spec.modulation.of_unit(unit).items()}
            outputs = self._outputs(name, {**given, **of_unit})
            for feature in spec.declared_units[unit].features:
                result.features[f"{name} {feature.output}"] = outputs[feature.output]
                result.gates[f"{name} {feature.output}"] = of_unit[feature.gate]
            given |= {"x": outputs["x_out"], "text": outputs.get("text_out", given["text"])}
        result.last = given["x"]
        result.prediction = self.final(result.last, table, spec)
        return result

    def final(self, x: np.ndarray, table: np.ndarray, spec: ModelSpec) -> np.ndarray:
        """Tokens (B, T, D) to the prediction (B, C_out, H, W)."""
        rows = spec.modulation
        given = {"shift": table[rows.final_shift], "scale": table[rows.final_scale]}
        given["x"] = x.reshape(len(x), *spec.axes, spec.hidden)
        return self._outputs("final", given)["prediction"].reshape(len(x), *spec.prediction)

    def _outputs(self, name: str, given: Mapping[str, np.ndarray]) -> Arrays:
        session, given = self._sessions[name], {**given, **self._weights.get(name, {})}
        inputs = {i.name: np.ascontiguousarray(given[i.name]) for i in session.get_inputs()}
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, inputs), strict=True))

    def _read(self, entry: GraphEntry) -> Arrays:
        assert entry.weights_file is not None
        content = np.fromfile(self._folder / entry.weights_file, np.uint8)
        return {
            p.name: content[p.offset :].view(np.float32)[: int(np.prod(p.shape))].reshape(p.shape)
            for p in entry.parameters
        }
