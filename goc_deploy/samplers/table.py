"""Samplers reduced to coefficients per step, so that the runtime needs no scheduler code."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from goc_deploy.samplers.flows import (
    EULER,
    LEAST_SIGNAL,
    UNIPC,
    SizeShift,
    flow_family,
    unipc_updates,
)
from goc_deploy.samplers.head import Head
from goc_deploy.samplers.process import TRAIN_STEPS, Process
from goc_deploy.samplers.solvers import (
    Update,
    estimate_weights,
)

MAX_LAGS = 3
MAX_REACH = 12
Solver = Callable[[Sequence[float]], list[Update]]  # from the signal along the timesteps


@dataclass(frozen=True, slots=True)
class SamplerTable:
    """The coefficients of a sampler at each step.

    With the latents x, the guided model output m and fresh noise z, a step is
    ``x[k+1] = latent[k] * x[k] + model[k] * m[k] + sum_i lag_coefficients[k][i-1] * d[k-i]
    + noise[k] * exp(spread[k] * v) * z``. The estimate
    ``d[k] = estimate[k][0] * x[k] + estimate[k][1] * m[k]`` is kept for later steps, and v are the
    variance channels of a model that learns sigma. At most `MAX_LAGS` coefficients of a row of
    ``lag_coefficients`` are not zero.

    Attributes:
        sampler: the sampler's SPEC, such as ``ddim:0.5`` or ``dpm++``.
        prediction_type: prediction type, one of `goc_deploy.spec.PREDICTION_TYPES`.
        timesteps: [T] the model's time input, in sampling order: training timesteps, or for a flow
            the time from 0 (noise) to 1 (clean).
        latent: [T] weights of the current latents.
        model: [T] weights of the guided model output.
        noise: [T] weights of fresh standard normal noise; all zero for a deterministic sampler.
        spread: [T] how strongly the learned variance scales the noise; all zero if it is fixed.
        estimate: [T] weights (of x, of m) of the kept estimate. It estimates the clean sample,
            unless a scheduler of diffusers keeps another quantity.
        lag_coefficients: [T][reach] weights of the estimates kept by earlier steps, newest first;
            reach is 0 for one-step samplers.
        start: weight of the standard normal noise that becomes x[0]. It is not 1 if a scheduler
            scales the model's input, because x is always the model's input.
        head: the correction that is added to x[k+1], or None.
        size_shift: how timesteps and weights depend on the number of tokens of an image, or None if
            they do not; see `at`.
    """

    sampler: str
    prediction_type: str
    timesteps: tuple[int | float, ...]
    latent: tuple[float, ...]
    model: tuple[float, ...]
    noise: tuple[float, ...]
    spread: tuple[float, ...]
    estimate: tuple[tuple[float, float], ...]
    lag_coefficients: tuple[tuple[float, ...], ...]
    start: float = 1.0
    head: Head | None = None
    size_shift: SizeShift | None = None

    def at(self, tokens: int) -> SamplerTable:
        """The table for images of some tokens; itself if it is the same for all images."""
        if self.size_shift is None:
            return self
        table = size_table(self.size_shift, self.steps, tokens)
        return replace(table, sampler=self.sampler, head=self.head)

    @property
    def steps(self) -> int:
        """Number of sampling steps T."""
        return len(self.timesteps)

    @property
    def stochastic(self) -> bool:
        """Whether fresh noise enters at any step."""
        return any(self.noise)

    @property
    def draws(self) -> int:
        """Number of noise tensors of an image: x_T, and one per step if the table is stochastic."""
        return 1 + (self.steps if self.stochastic else 0)

    @property
    def learned_variance(self) -> bool:
        """Whether the variance channels of the model scale the noise."""
        return any(self.spread)

    @property
    def reach(self) -> int:
        """Number of steps between a step and the oldest estimate that it may read."""
        return len(self.lag_coefficients[0]) if self.lag_coefficients else 0

    @property
    def lags(self) -> int:
        """Number of earlier estimates that a step reads."""
        return min(self.reach, MAX_LAGS)

    def reads(self, step: int) -> tuple[int, ...]:
        """For each of the `lags` estimates that a step reads, how many steps back it was made.

        The order is newest first. Estimates with a weight come before those without. If the reach
        is not longer than the number of lags, all of them are read.
        """
        weights = self.lag_coefficients[step]
        by_use = sorted(range(1, self.reach + 1), key=lambda lag: (not weights[lag - 1], lag))
        return tuple(sorted(by_use[: self.lags]))

    @property
    def graph(self) -> str:
        """Name of the unit that executes a row.

        It is ``sampler``, ``sampler_learned``, or ``sampler_lag1`` to ``sampler_lag3``. With a
        head, the signature of its form follows, such as ``sampler_lag2+hidden3-2``.
        """
        base = (
            "sampler_learned"
            if self.learned_variance
            else f"sampler_lag{self.lags}"
            if self.lags
            else "sampler"
        )
        return base if self.head is None else f"{base}+{self.head.form.signature}"

    @property
    def rows(self) -> tuple[tuple[float, ...], ...]:
        """[T] coefficients in the order of the unit's input."""
        plain = zip(self.latent, self.model, self.noise, strict=True)
        if self.learned_variance:
            return tuple((*row, spread) for row, spread in zip(plain, self.spread, strict=True))
        if not self.lags:
            return tuple(plain)
        weights = (
            tuple(row[lag - 1] for lag in self.reads(step))
            for step, row in enumerate(self.lag_coefficients)
        )
        return tuple(
            (*row, *e, *w) for row, e, w in zip(plain, self.estimate, weights, strict=True)
        )


def solved_table(
    sampler: str, solve: Solver, timesteps: tuple[int, ...], process: Process
) -> SamplerTable:
    """Make the table of a solver along training timesteps, in falling order."""
    signal, prediction = process.signal_along(timesteps), process.prediction_type
    estimate = tuple(estimate_weights(prediction, s) for s in signal[:-1])
    return _table(sampler, prediction, timesteps, solve(signal), estimate)


def flow_table(sampler: str, timesteps: Sequence[float], prediction: str) -> SamplerTable:
    """Make the table of a sampler of flows, along the line between noise and the clean sample.

    Args:
        sampler: SPEC of ``euler`` or ``unipc``. A shift in it is not applied to the timesteps.
        timesteps: [T] the model's time input, in sampling order. For ``flow`` it rises from 0
            (noise) to 1 (clean), and the model predicts ``clean - noise``. For ``flow_to_noise`` it
            falls from 1000 (noise) to 0 (clean), and the model predicts ``noise - clean``. UniPC
            truncates the latter to whole numbers, as Wan does.
        prediction: ``flow`` or ``flow_to_noise``.

    Source: Liu et al., "Flow Straight and Fast", ICLR 2023, eq. 1; Ma et al., "SiT", ECCV 2024,
    section 2.
    """
    whole, clean = (1, 1.0) if prediction == "flow" else (TRAIN_STEPS, 0.0)
    times = [t / whole for t in timesteps]
    if flow_family(sampler) == UNIPC:
        sigmas = [min(abs(clean - time), 1 - LEAST_SIGNAL) for time in times]
        told = tuple(timesteps) if clean else tuple(int(whole * sigma) for sigma in sigmas)
        estimate = tuple((1.0, math.copysign(sigma, clean - 0.5)) for sigma in sigmas)
        return _table(sampler, prediction, told, unipc_updates(sigmas), estimate)
    zeros = (0.0,) * len(times)
    return SamplerTable(
        sampler=sampler,
        prediction_type=prediction,
        timesteps=tuple(timesteps),
        latent=(1.0,) * len(times),
        model=tuple(after - now for now, after in pairwise((*times, clean))),
        noise=zeros,
        spread=zeros,
        estimate=tuple((1.0, clean - time) for time in times),
        lag_coefficients=((),) * len(times),
    )


def size_table(size_shift: SizeShift, steps: int, tokens: int) -> SamplerTable:
    """Make the table of Euler steps whose noise levels depend on the number of tokens."""
    sigmas = size_shift.sigmas(steps, tokens)
    table = flow_table(EULER, [TRAIN_STEPS * sigma for sigma in sigmas], "flow_to_noise")
    return replace(table, size_shift=size_shift)


def _table(
    sampler: str,
    prediction: str,
    timesteps: tuple[int | float, ...],
    updates: Sequence[Update],
    estimate: tuple[tuple[float, float], ...],
) -> SamplerTable:
    """Make a table of updates, with the weights that estimate the clean sample at each step."""
    lags = max(len(update.estimates) for update in updates) - 1
    return SamplerTable(
        sampler=sampler,
        prediction_type=prediction,
        timesteps=timesteps,
        latent=tuple(
            u.latent + u.estimates[0] * of_x for u, (of_x, _) in zip(updates, estimate, strict=True)
        ),
        model=tuple(u.estimates[0] * of_m for u, (_, of_m) in zip(updates, estimate, strict=True)),
        noise=tuple(u.noise for u in updates),
        spread=tuple(u.spread for u in updates),
        estimate=estimate,
        lag_coefficients=tuple(
            (*u.estimates[1:], *[0.0] * (lags + 1 - len(u.estimates))) for u in updates
        ),
    )
