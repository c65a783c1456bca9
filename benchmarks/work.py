"""What every contender is given, and the sampling loop that the PyTorch ones share."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from goc_deploy.samplers import SamplerTable


@dataclass(frozen=True, slots=True)
class Work:
    """One request.

    Attributes:
        noise: x_T, (N, C, H, W) float32.
        labels: N class labels.
        null_label: label of the unconditional rows.
        cfg_scale: guidance scale; it acts on all channels, because diffusers cannot do otherwise.
        table: the sampler.
    """

    noise: np.ndarray
    labels: tuple[int, ...]
    null_label: int
    cfg_scale: float
    table: SamplerTable


@dataclass(frozen=True, slots=True)
class Outcome:
    """Final latents (N, C, H, W) float32 and the milliseconds of each step.

    The rest of the total is preparation.
    """

    latents: np.ndarray
    step_ms: tuple[float, ...]
    total_ms: float


@dataclass(frozen=True, slots=True)
class Contender:
    """Something that does the work.

    Attributes:
        name: short, unique.
        what: one line for the reader.
        twin: the eager PyTorch contender that computes the same numbers.
        run: does the work.
    """

    name: str
    what: str
    twin: str
    run: Callable[[Work], Outcome]


Predict = Callable[[Tensor, Tensor, Tensor, int], Tensor]


@torch.inference_mode()
def sampled(predict: Predict, work: Work) -> Outcome:
    """Classifier-free guidance and the sampler in plain PyTorch.

    Args:
        predict: (x (2N, C, H, W), timesteps (2N,), labels (2N,), step) to the model
            output (2N, C_out, H, W).
        work: the request.
    """
    n, channels = len(work.labels), work.noise.shape[1]
    labels = torch.tensor([*work.labels, *[work.null_label] * n])
    x = torch.from_numpy(work.noise)
    started = time.perf_counter()
    step_ms = []
    for step, timestep in enumerate(work.table.timesteps):
        step_started = time.perf_counter()
        timesteps = torch.full((2 * n,), float(timestep))
        cond, uncond = predict(torch.cat([x, x]), timesteps, labels, step)[:, :channels].chunk(2)
        guided = uncond + work.cfg_scale * (cond - uncond)
        x = work.table.latent[step] * x + work.table.model[step] * guided
        step_ms.append(1e3 * (time.perf_counter() - step_started))
    return Outcome(x.numpy(), tuple(step_ms), 1e3 * (time.perf_counter() - started))
