"""A model that goc_deploy and cache-dit both run: one set of weights, one request."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from benchmarks.work import Predict, Work
from goc_deploy.conditions.captions import PromptEmbeds
from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.spec import ModelSpec

CFG_SCALE = 4.0
Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class PeerModel:
    """A model and what it is asked for.

    Class labels and captions are rows of a table, so that one sampling loop serves every family.

    Attributes:
        what: one line for the reader.
        spec: its sizes.
        engine: the engine directory.
        transformer: makes a transformer of diffusers; all of them share their tensors.
        predict: from such a transformer to a function of (x, timesteps, rows of the table, step).
        work: the request; its labels are rows of the table.
        captions: the table of a text-conditional model, else None.
    """

    what: str
    spec: ModelSpec
    engine: Path
    transformer: Callable[[], nn.Module]
    predict: Callable[[nn.Module], Predict]
    work: Work
    captions: PromptEmbeds | None = None


def work_of(engine: Path, plan: str, labels: tuple[int, ...], null_label: int) -> Work:
    """The request, with the sampler of a plan of the engine directory."""
    directory = EngineDir.open(engine)
    shape = (len(labels), *directory.manifest.model.latents)
    noise = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    return Work(noise, labels, null_label, CFG_SCALE, directory.plan(plan).sampler)


def table_of_captions(arrays: Arrays, name: str) -> np.ndarray:
    """The rows of ``name``, followed by those for the negative captions."""
    return np.concatenate([arrays[name], arrays[f"negative_{name}"]])


def parameters_of(tensors: Iterable[Tensor]) -> str:
    """The number of parameters, for the reader."""
    return f"{sum(tensor.numel() for tensor in tensors) / 1e6:.1f} M parameters"
