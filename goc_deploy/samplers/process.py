"""The process that a model was trained on: its prediction type and its noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from operator import mul
from typing import Any

from goc_deploy.errors import UsageError

TRAIN_STEPS = 1000
BETA_FIRST, BETA_LAST = 1e-4, 0.02
# Key of a scheduler's settings. It is true if the pipeline gives the scheduler T even noise levels
# from 1 to 1 / T, and the shift for the size of the image.
EVEN_SIGMAS = "even_sigmas"
FITTED_SHIFT = (
    "fitted_shift"  # likewise, if that shift is `goc_deploy.samplers.flows.fitted_exponent`
)
BETA_MOST = 0.999  # largest beta of the cosine schedule


@dataclass(frozen=True, slots=True)
class Process:
    """The noise process that a sampler reverses.

    Attributes:
        prediction_type: prediction type, one of `goc_deploy.spec.PREDICTION_TYPES`.
        scheduler: content of ``scheduler/scheduler_config.json`` in the model's folder, and
            `EVEN_SIGMAS` if that is true; None if there is no such file. Then the betas are linear,
            from 1e-4 to 0.02 over 1000 steps, as for DiT and PixArt.
        tokens: tokens of an image of the usual size, for schedulers whose steps depend on it.
    """

    prediction_type: str
    scheduler: Mapping[str, Any] | None = None
    tokens: int = 0

    def signal(self) -> list[float]:
        """Share of the clean sample's variance at each training timestep (alphas_cumprod).

        Raises:
            UsageError: naming the setting of the scheduler that is not supported.
        """
        return list(accumulate((1 - beta for beta in _betas(self.scheduler or {})), mul))

    def signal_along(self, timesteps: Sequence[int]) -> list[float]:
        """`signal` at some timesteps, followed by 1.0 for the clean sample."""
        signal = self.signal()
        return [*(signal[t] for t in timesteps), 1.0]


def _betas(scheduler: Mapping[str, Any]) -> list[float]:
    """Return the variance that each of the 1000 training steps adds.

    Source: Ho et al., NeurIPS 2020, section 4 (linear); Rombach et al., CVPR 2022, appendix
    (scaled linear); Nichol and Dhariwal, ICML 2021, eq. 17 (cosine).
    """
    steps, kind = (
        scheduler.get("num_train_timesteps", TRAIN_STEPS),
        scheduler.get("beta_schedule", "linear"),
    )
    trained, rescaled = (
        scheduler.get("trained_betas"),
        scheduler.get("rescale_betas_zero_snr", False),
    )
    if steps != TRAIN_STEPS or rescaled not in (None, False):
        name, value = (
            ("num_train_timesteps", steps)
            if steps != TRAIN_STEPS
            else ("rescale_betas_zero_snr", rescaled)
        )
        raise UsageError(
            f"the folder's scheduler has {name} {value!r}, which the samplers of this "
            "project do not know; use the folder's own: `sampler=diffusers`"
        )
    if trained is not None:
        return _given(trained)
    first, last = scheduler.get("beta_start", BETA_FIRST), scheduler.get("beta_end", BETA_LAST)
    if kind == "squaredcos_cap_v2":
        left = [
            math.cos((t / TRAIN_STEPS + 0.008) / 1.008 * math.pi / 2) ** 2
            for t in range(TRAIN_STEPS + 1)
        ]
        return [min(1 - after / now, BETA_MOST) for now, after in pairwise(left)]
    numbers = isinstance(first, int | float) and isinstance(last, int | float)
    if kind not in ("linear", "scaled_linear") or not numbers or not 0 < first <= last < 1:
        raise UsageError(
            f"the folder's scheduler has beta_schedule {kind!r} from {first!r} to "
            f"{last!r}, which the samplers of this project do not know; "
            "use the folder's own: `sampler=diffusers`"
        )
    if kind == "scaled_linear":
        slope = (math.sqrt(last) - math.sqrt(first)) / (TRAIN_STEPS - 1)
        return [(math.sqrt(first) + slope * t) ** 2 for t in range(TRAIN_STEPS)]
    slope = (last - first) / (TRAIN_STEPS - 1)
    return [first + slope * t for t in range(TRAIN_STEPS)]


def _given(trained: Any) -> list[float]:
    if not isinstance(trained, list) or len(trained) != TRAIN_STEPS:
        raise UsageError(
            f"the folder's scheduler has trained_betas that are not a list of {TRAIN_STEPS} numbers"
        )
    betas = [float(beta) if isinstance(beta, int | float) else math.nan for beta in trained]
    if not all(0 < beta < 1 for beta in betas):
        raise UsageError(
            "the folder's scheduler has trained_betas outside 0..1; every beta must lie between"
        )
    return betas
