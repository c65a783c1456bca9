"""Samplers reduced to coefficients per step, so that the runtime needs no scheduler code.

The diffusion process is the one DiT was trained with: 1000 steps, linear betas from 1e-4 to 0.02, the model predicts
the noise. Source: Song et al., "Denoising Diffusion Implicit Models", ICLR 2021, eq. 12.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate, pairwise
from operator import mul

from goc_deploy.errors import UsageError

TRAIN_STEPS = 1000
BETA_FIRST, BETA_LAST = 1e-4, 0.02


@dataclass(frozen=True, slots=True)
class SamplerTable:
    """``x[k+1] = latent[k] * x[k] + model[k] * noise_prediction[k] + noise[k] * z[k]``.

    Attributes:
        sampler: the sampler's SPEC, such as ``ddim`` or ``ddim:0.5``.
        timesteps: [T] training timesteps in sampling order.
        latent: [T] weights of the current latents.
        model: [T] weights of the guided noise prediction.
        noise: [T] weights of fresh standard normal noise; all zero for a deterministic sampler.
    """

    sampler: str
    timesteps: tuple[int, ...]
    latent: tuple[float, ...]
    model: tuple[float, ...]
    noise: tuple[float, ...]

    @property
    def steps(self) -> int:
        """Number of sampling steps T."""
        return len(self.timesteps)

    @property
    def stochastic(self) -> bool:
        """Whether fresh noise enters at any step."""
        return any(self.noise)


def spaced_timesteps(steps: int) -> tuple[int, ...]:
    """``steps`` training timesteps spread evenly over 999..0, in sampling order.

    One step means timestep 999.

    Raises:
        UsageError: ``steps`` is not within 1..1000.
    """
    if not 1 <= steps <= TRAIN_STEPS:
        raise UsageError(f"steps must be within 1..{TRAIN_STEPS}, got {steps}")
    if steps == 1:
        return (TRAIN_STEPS - 1,)
    stride = (TRAIN_STEPS - 1) / (steps - 1)
    return tuple(round(i * stride) for i in reversed(range(steps)))


def sampler_table(sampler: str, steps: int) -> SamplerTable:
    """The table of a sampler: ``ddim`` or ``ddim:ETA`` with ETA in 0..1 (0 is deterministic).

    Raises:
        UsageError: unknown sampler, or a number out of range.
    """
    name, colon, eta_text = sampler.partition(":")
    if name != "ddim":
        raise UsageError(f"unknown sampler {sampler!r}; this version has ddim and ddim:ETA")
    try:
        eta = float(eta_text) if colon else 0.0
    except ValueError:
        raise UsageError(f"sampler {sampler!r}: eta {eta_text!r} is not a number") from None
    if not 0 <= eta <= 1:
        raise UsageError(f"sampler {sampler!r}: eta must be within 0..1")
    timesteps = spaced_timesteps(steps)
    slope = (BETA_LAST - BETA_FIRST) / (TRAIN_STEPS - 1)
    signal = list(accumulate((1 - (BETA_FIRST + slope * t) for t in range(TRAIN_STEPS)), mul))  # alphas_cumprod
    rows = [_ddim_row(now, after, eta) for now, after in pairwise([*(signal[t] for t in timesteps), 1.0])]
    latent, model, noise = zip(*rows, strict=True)
    return SamplerTable(sampler, timesteps, latent, model, noise)


def _ddim_row(now: float, after: float, eta: float) -> tuple[float, float, float]:
    sigma = eta * math.sqrt((1 - after) / (1 - now) * (1 - now / after))
    latent = math.sqrt(after / now)
    model = math.sqrt(max(0.0, 1 - after - sigma**2)) - latent * math.sqrt(1 - now)
    return latent, model, sigma
