"""Samplers of flows: their SPECs, the noise levels that they visit, and the updates of UniPC.

The noise level sigma is the share of noise in the latents: they are
``(1 - sigma) * clean + sigma * noise``. It falls from 1 to 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated

from msgspec import Meta

from goc_deploy.errors import UsageError
from goc_deploy.samplers.process import TRAIN_STEPS
from goc_deploy.samplers.solvers import Update

EULER, UNIPC = "euler", "unipc"
FLOW_SAMPLERS = (EULER, UNIPC)
SHIFT = "shift="
MAX_SHIFT = 1000.0
FITTED_TOKENS = 4300  # of an image, up to which the fit of FLUX.2 depends on the number of steps
LEAST_SIGNAL = 1e-6  # at the first step of UniPC, whose log-SNR would be infinite without a signal


MAX_EXPONENT = 30.0  # public models are between 0 and 3; a file may have anything


@dataclass(frozen=True, slots=True)
class SizeShift:
    """A shift of the noise levels that depends on the number of tokens of an image.

    The logarithm of the shift is a linear function of the number of tokens, which is given at two
    points. The field names are those of diffusers' ``FlowMatchEulerDiscreteScheduler``.

    Attributes:
        base_shift: logarithm of the shift for ``base_image_seq_len`` tokens.
        max_shift: logarithm of the shift for ``max_image_seq_len`` tokens.
        base_image_seq_len: number of tokens of a small image.
        max_image_seq_len: number of tokens of a large image.
        shift_terminal: the noise level at the last step, to which all levels are then stretched; 0
            if they are not.
        fitted_shift: whether the logarithm is `fitted_exponent` in place of the linear function.
    """

    base_shift: Annotated[float, Meta(ge=-10, le=10)] = 0.5
    max_shift: Annotated[float, Meta(ge=-10, le=10)] = 1.15
    base_image_seq_len: Annotated[int, Meta(ge=0, le=10**6)] = 256
    max_image_seq_len: Annotated[int, Meta(ge=1, le=10**6)] = 4096
    shift_terminal: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    fitted_shift: bool = False

    def __post_init__(self) -> None:
        if self.max_image_seq_len <= self.base_image_seq_len:
            raise ValueError(
                f"max_image_seq_len is {self.max_image_seq_len}, expected more than "
                f"base_image_seq_len, {self.base_image_seq_len}"
            )

    def exponent(self, tokens: int, steps: int) -> float:
        """The logarithm of the shift for images of some tokens, in T steps."""
        if self.fitted_shift:
            return fitted_exponent(tokens, steps)
        slope = (self.max_shift - self.base_shift) / (
            self.max_image_seq_len - self.base_image_seq_len
        )
        exponent = self.base_shift + slope * (tokens - self.base_image_seq_len)
        return max(-MAX_EXPONENT, min(MAX_EXPONENT, exponent))

    def sigmas(self, steps: int, tokens: int) -> list[float]:
        """The noise level at each of T steps, from 1, for images of some tokens."""
        shift = math.exp(self.exponent(tokens, steps))
        sigmas = [shifted(1 - k / steps, shift) for k in range(steps)]
        if not self.shift_terminal or steps == 1:
            return sigmas
        stretch = (1 - self.shift_terminal) / (1 - sigmas[-1])
        return [1 - (1 - sigma) * stretch for sigma in sigmas]


def fitted_exponent(tokens: int, steps: int) -> float:
    """The logarithm of the shift of FLUX.2 for images of some tokens, in T steps.

    The authors fitted a line over the tokens for 10 steps and one for 200, and join them by a line
    over the steps. Images of many tokens have that of 200 steps.

    Source: ``compute_empirical_mu`` of diffusers' ``Flux2Pipeline``.
    """
    many = 1.6927e-4 * tokens + 0.45666666  # for 200 steps
    if tokens > FITTED_TOKENS:
        return many
    few = 8.73809524e-5 * tokens + 1.89833333  # for 10 steps
    slope = (many - few) / 190
    return many + slope * (steps - 200)


def flow_family(sampler: str) -> str:
    """Return the SPEC of a sampler without its shift: ``unipc`` for ``unipc@shift=3``."""
    return sampler.partition("@")[0]


def flow_timesteps(sampler: str, steps: int, prediction: str) -> tuple[float, ...]:
    """Return the model's time input at each step of a sampler of flows, before any rounding.

    Without a shift the steps are even. A shift above 1 takes more of them at high noise levels.
    ``unipc`` spaces its steps as Wan does, and so ends one training step above the clean sample.

    Args:
        sampler: ``euler`` or ``unipc``, or one of both with ``@shift=S``.
        steps: number of steps T.
        prediction: ``flow`` for times from 0 (noise) to 1, ``flow_to_noise`` for times from 1000
            (noise) to 0.

    Raises:
        UsageError: the shift is not a number above 0.

    Source: Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis",
    ICML 2024, eq. 23.
    """
    family, at, option = sampler.partition("@")
    shift, rises = _shift(sampler, option) if at else 1.0, prediction == "flow"
    if family == UNIPC:
        stride = (1 / TRAIN_STEPS - 1) / steps
        even = [1 - (k * stride + 1) if rises else k * stride + 1 for k in range(steps)]
    else:
        even = [k / steps if rises else 1 - k / steps for k in range(steps)]
    if rises:
        return tuple(shifted(share, 1 / shift) for share in even)
    return tuple(TRAIN_STEPS * shifted(share, shift) for share in even)


def shifted(share: float, shift: float) -> float:
    """Return the share of noise that a shift makes of another one; 0 and 1 stay.

    The share of the clean sample changes by the shift ``1 / shift``.
    """
    return shift * share / (1 + (shift - 1) * share)


def _shift(sampler: str, option: str) -> float:
    number = option.removeprefix(SHIFT)
    try:
        shift = float(number) if number != option else math.nan
    except ValueError:
        shift = math.nan
    if not 0 < shift <= MAX_SHIFT:
        raise UsageError(
            f"sampler {sampler!r}: expected @{SHIFT}S with a number S above 0, such as "
            f"{flow_family(sampler)}@{SHIFT}3"
        )
    return shift


def unipc_updates(sigmas: Sequence[float]) -> list[Update]:
    """Return the updates of UniPC of order 2 (B2) with its corrector, for a flow.

    The solver keeps a corrected sample next to the latents. It is a weighted sum of the latents and
    of earlier estimates, so it is eliminated here. The first and the last step are of order 1.

    Args:
        sigmas: [T] noise levels at which the steps begin; 0 follows the last one.

    Source: Zhao et al., "UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of
    Diffusion Models", NeurIPS 2023, algorithms 1 to 3.
    """
    steps = len(sigmas)
    sigma = [*(min(s, 1 - LEAST_SIGNAL) for s in sigmas), 0.0]
    alpha = [1 - s for s in sigma]
    log_snr = [math.log(a / s) for a, s in zip(alpha[:-1], sigma[:-1], strict=True)]
    widths = [after - now for now, after in pairwise(log_snr)]  # halved log-SNR, per step
    updates, before = [], (0.0, 0.0)  # weights of the estimates in the predictor of the last step
    for k in range(steps):
        ratio = sigma[k + 1] / sigma[k]
        predictor = _predictor(alpha[k + 1], widths[max(0, k - 1) : k + 1], last=k == steps - 1)
        corrector = _corrector(alpha[k], widths[max(0, k - 2) : k]) if k else (0.0, 0.0, 0.0)
        weights = (
            ratio * corrector[0] + predictor[0],
            ratio * (corrector[1] - before[0]) + predictor[1],
            ratio * (corrector[2] - before[1]),
        )
        updates.append(Update(ratio, weights[: min(k, 2) + 1]))
        before = predictor
    return updates


def _predictor(alpha: float, widths: Sequence[float], *, last: bool) -> tuple[float, float]:
    """Return the weights of d[k] and d[k-1] in a step.

    ``widths`` are those of the step before, if there is one, and of this one, which is infinite if
    it is the last.
    """
    if last:
        return (alpha, 0.0)
    gain = -alpha * math.expm1(-widths[-1])
    if len(widths) == 1:
        return (gain, 0.0)
    slope = widths[1] / widths[0] / 2
    return (gain * (1 + slope), -gain * slope)


def _corrector(alpha: float, widths: Sequence[float]) -> tuple[float, float, float]:
    """Return the weights of d[k], d[k-1] and d[k-2] in the correction of the latents of step k.

    ``widths`` are those of the two steps before; of one step if there was only one.
    """
    h, decay = -widths[-1], math.expm1(-widths[-1])
    if len(widths) == 1:
        return (-alpha * decay / 2, -alpha * decay / 2, 0.0)
    ratio = -widths[0] / widths[1]
    first = decay / h - 1
    second = first / h - 1 / 2
    # The weights of the two differences solve a system of two equations.
    older = (first - 2 * second) / (1 - ratio)
    newer = first - older
    return (-alpha * newer, alpha * (newer + older / ratio - decay), -alpha * older / ratio)
