"""The DiT of the digits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

import goc_deploy
from benchmarks.diffusers_dit import transformer_from_dit
from benchmarks.eager import read_dit
from benchmarks.peers.model import PeerModel, parameters_of, work_of
from benchmarks.work import Predict

DIGITS = Path(__file__).resolve().parents[2] / "examples/mnist/dit_mnist.pt"
HEADS = 4


def digits_dit(folder: Path, images: int, steps: int, plans: Sequence[str]) -> PeerModel:
    """The trained model, exported with plans to a folder."""
    model = read_dit(DIGITS, HEADS)
    spec = model.spec
    engine = folder / "engine"
    goc_deploy.export(DIGITS, engine, num_heads=HEADS, plans=plans, steps=steps, max_batch=images)
    labels = tuple(i % spec.choices for i in range(images))
    return PeerModel(
        f"DiT of the digits, {parameters_of(model.state_dict().values())}, trained",
        spec,
        engine,
        lambda: transformer_from_dit(model),
        predict_with,
        work_of(engine, plans[0], labels, spec.choices),
    )


def predict_with(transformer: nn.Module) -> Predict:
    return lambda x, t, labels, _: transformer(x, timestep=t, class_labels=labels).sample
