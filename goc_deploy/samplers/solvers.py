"""The timesteps that a sampler visits, and its update at each of them, as numbers.

Every update is a weighted sum of the latents ``x``, estimates ``d`` of the clean sample and fresh
noise ``z``. `estimate_weights` turns the model output (noise, velocity, clean sample) into ``d``.
``signal`` is the share of the clean sample's variance at each visited timestep (alphas_cumprod),
followed by 1.0 for the clean sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from goc_deploy.errors import UsageError
from goc_deploy.samplers.process import TRAIN_STEPS

SPACINGS = ("linspace", "leading", "trailing")
FEW_STEPS = 15  # with fewer, a third-order solver uses second order in its last step but one


@dataclass(frozen=True, slots=True)
class Update:
    """``x[k+1] = latent * x[k] + sum_i estimates[i] * d[k-i] + noise * exp(spread * v) * z``.

    Attributes:
        latent: weight of the current latents.
        estimates: weights of the estimates of the clean sample, newest first.
        noise: weight of fresh standard normal noise.
        spread: how strongly the variance channels v of the model (-1 is the least variance, 1 the
            most) scale the noise.
    """

    latent: float
    estimates: tuple[float, ...]
    noise: float = 0.0
    spread: float = 0.0


def spaced_timesteps(
    steps: int, spacing: str = "linspace", *, visits_zero: bool = True
) -> tuple[int, ...]:
    """Return ``steps`` training timesteps in sampling order.

    Args:
        steps: number of steps T.
        spacing: ``linspace`` spreads them evenly over 999..0 (one step means 999); ``leading``
            takes multiples of a whole stride from 0 up; ``trailing`` takes strides from 999 down.
        visits_zero: True if timestep 0 is one of the steps, False if it follows them and is left
            out.

    Raises:
        UsageError: too few or too many steps.

    Source: Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed", WACV 2024,
    table 2.
    """
    skipped = 0 if visits_zero or spacing == "trailing" else 1
    points, most = steps + skipped, TRAIN_STEPS - skipped
    check_steps(steps, most)
    if spacing == "trailing":
        return tuple(round(TRAIN_STEPS - i * TRAIN_STEPS / steps) - 1 for i in range(steps))
    visited = reversed(range(skipped, points))
    if spacing == "leading":
        return tuple(i * (TRAIN_STEPS // points) for i in visited)
    if points == 1:
        return (TRAIN_STEPS - 1,)
    stride = (TRAIN_STEPS - 1) / (points - 1)
    return tuple(round(i * stride) for i in visited)


def check_steps(steps: int, most: int) -> None:
    """Raise UsageError unless there are 1 to ``most`` steps."""
    if not 1 <= steps <= most:
        raise UsageError(f"steps must be within 1..{most}, got {steps}")


def estimate_weights(prediction: str, signal: float) -> tuple[float, float]:
    """Return weights (of the latents, of the model output) that estimate the clean sample.

    Source: Salimans and Ho, "Progressive Distillation for Fast Sampling of Diffusion Models", ICLR
    2022, section 4 (v).
    """
    alpha, sigma = math.sqrt(signal), math.sqrt(1 - signal)
    return {"eps": (1 / alpha, -sigma / alpha), "v": (alpha, -sigma), "x0": (0.0, 1.0)}[prediction]


def ddim_updates(signal: Sequence[float], eta: float) -> list[Update]:
    """Return the updates of DDIM; ``eta`` 0 is deterministic, 1 ancestral with least variance.

    Source: Song et al., "Denoising Diffusion Implicit Models", ICLR 2021, eq. 12.
    """

    def update(now: float, after: float) -> Update:
        noise = eta * math.sqrt((1 - after) / (1 - now) * (1 - now / after))
        latent = math.sqrt(max(0.0, 1 - after - noise**2) / (1 - now))
        return Update(latent, (math.sqrt(after) - latent * math.sqrt(now),), noise)

    return [update(now, after) for now, after in pairwise(signal)]


def ddpm_updates(signal: Sequence[float]) -> list[Update]:
    """Return the updates of ancestral sampling with the learned variance.

    The model learned a variance between two bounds. The last step adds no noise.

    Source: Nichol and Dhariwal, "Improved Denoising Diffusion Probabilistic Models", ICML 2021,
    eq. 15.
    """

    def update(now: float, after: float) -> Update:
        beta = 1 - now / after
        latent = math.sqrt(now / after) * (1 - after) / (1 - now)
        denoised = math.sqrt(after) * beta / (1 - now)
        if after == 1.0:
            return Update(latent, (denoised,))
        log_most, log_least = math.log(beta), math.log(beta * (1 - after) / (1 - now))
        return Update(
            latent, (denoised,), math.exp((log_most + log_least) / 4), (log_most - log_least) / 4
        )

    return [update(now, after) for now, after in pairwise(signal)]


def dpm_solver_updates(signal: Sequence[float], order: int) -> list[Update]:
    """Return the updates of DPM-Solver++ multistep with midpoint corrections.

    The first steps and the last one are of lower order; first order is DDIM.

    Source: Lu et al., "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic
    Models", 2022, algorithm 2 and appendix A.
    """
    steps = len(signal) - 1
    alpha, sigma = [math.sqrt(s) for s in signal], [math.sqrt(1 - s) for s in signal]
    log_snr = [
        math.log(a / s) for a, s in zip(alpha[:-1], sigma[:-1], strict=True)
    ]  # halved, as in the paper
    updates = []
    for k in range(steps):
        last = 1 if k == steps - 1 else 2 if k == steps - 2 and steps < FEW_STEPS else order
        gain = alpha[k + 1] - alpha[k] * sigma[k + 1] / sigma[k]  # alpha' * (1 - exp(-h))
        widths = [later - earlier for earlier, later in pairwise(log_snr[max(0, k - 2) : k + 2])][
            ::-1
        ]
        weights = _corrected(gain, alpha[k + 1], widths, min(order, k + 1, last))
        updates.append(Update(sigma[k + 1] / sigma[k], weights))
    return updates


def _corrected(gain: float, alpha: float, widths: Sequence[float], order: int) -> tuple[float, ...]:
    """Return weights of d[k], d[k-1], ...: the first-order gain, then finite differences.

    ``widths`` are those of the coming step and of the steps before it, in log-SNR, newest first.
    """
    if order == 1:
        return (gain,)
    slope = widths[0] / widths[1]  # the first difference is slope * (d[k] - d[k-1])
    if order == 2:
        return (gain + gain * slope / 2, -gain * slope / 2)
    h, earlier = widths[0], widths[0] / widths[2]
    r0, r1 = 1 / slope, 1 / earlier
    mixed = r0 / (r0 + r1)
    first = alpha - gain / h  # weight of the first derivative
    second = alpha / 2 - (alpha * h - gain) / h**2  # weight of the second derivative
    newer = first * (1 + mixed) + second / (r0 + r1)
    older = -first * mixed - second / (r0 + r1)
    return (gain + newer * slope, older * earlier - newer * slope, -older * earlier)
