"""One ONNX graph for a whole forward pass, as torch.onnx exports a model, on ONNX Runtime."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import onnxruntime
import torch

from benchmarks.work import Outcome, Work
from goc_deploy.engines.ort import shared_pool_of_process
from goc_deploy.exporters.architectures.dit_model import DiT


def write_graph(model: DiT, path: Path) -> None:
    """Export ``model(x, t, labels)`` with its weights beside the graph."""
    spec = model.spec
    rows = torch.export.Dim("rows", min=2, max=1 << 16)
    example = (
        torch.randn(2, spec.channels, spec.side, spec.side),
        torch.tensor([999.0, 3.0]),
        torch.tensor([0, 1]),
    )
    program = torch.onnx.export(
        model,
        example,
        dynamo=True,
        input_names=["x", "t", "labels"],
        output_names=["prediction"],
        dynamic_shapes=({0: rows}, {0: rows}, {0: rows}),
        opset_version=20,
        verbose=False,
    )
    if program is None:
        raise RuntimeError("torch.onnx gave no graph")
    program.save(str(path), external_data=True)


class MonolithicGraph:
    """The graph with ONNX Runtime's defaults; guidance and sampler are in NumPy.

    It uses the thread pool that goc_deploy uses.
    """

    def __init__(self, path: Path, threads: int) -> None:
        shared_pool_of_process(threads)
        options = onnxruntime.SessionOptions()
        options.use_per_session_threads = False
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )

    def run(self, work: Work) -> Outcome:
        """Sample with one run of the graph per step."""
        n, channels = len(work.labels), work.noise.shape[1]
        labels = np.asarray([*work.labels, *[work.null_label] * n])
        x, step_ms = work.noise, []
        started = time.perf_counter()
        for step, timestep in enumerate(work.table.timesteps):
            step_started = time.perf_counter()
            timesteps = np.full(2 * n, timestep, np.float32)
            feed = {"x": np.concatenate([x, x]), "t": timesteps, "labels": labels}
            cond, uncond = np.split(self._session.run(["prediction"], feed)[0][:, :channels], 2)
            guided = uncond + np.float32(work.cfg_scale) * (cond - uncond)
            x = (
                np.float32(work.table.latent[step]) * x
                + np.float32(work.table.model[step]) * guided
            )
            step_ms.append(1e3 * (time.perf_counter() - step_started))
        return Outcome(x, tuple(step_ms), 1e3 * (time.perf_counter() - started))
