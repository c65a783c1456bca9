"""Samplers reduced to coefficients per step, so that the runtime needs no scheduler code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from goc_deploy.errors import UsageError
from goc_deploy.samplers.head import Head
from goc_deploy.samplers.process import TRAIN_STEPS, Process
from goc_deploy.samplers.solvers import (
    SPACINGS,
    Update,
    check_steps,
    ddim_updates,
    ddpm_updates,
    dpm_solver_updates,
    estimate_weights,
    spaced_timesteps,
)
from goc_deploy.spec import FLOW_PREDICTION_TYPES, PREDICTION_TYPES, ModelSpec

SAMPLER_GRAMMAR = (
    "ddim[:ETA] | dpm++[:ORDER] | ddpm, each with [@linspace | @leading | @trailing], euler for "
    "flow models, or diffusers for the scheduler of the model's folder"
)
FLOW_SAMPLER = "euler"
FOLDER_SAMPLER = "diffusers"
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

    @property
    def steps(self) -> int:
        """Number of sampling steps T."""
        return len(self.timesteps)

    @property
    def stochastic(self) -> bool:
        """Whether fresh noise enters at any step."""
        return any(self.noise)

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


def sampler_table(sampler: str, steps: int, process: Process) -> SamplerTable:
    """Make the table of a sampler of this project.

    For ``diffusers`` see `goc_deploy.exporters.schedulers.table_from_sampler`.

    Args:
        sampler: ``ddim`` or ``ddim:ETA`` with ETA in 0..1 (0 is deterministic); ``dpm++`` or
            ``dpm++:ORDER`` with ORDER 1 to 3 (default 2); ``ddpm``, which samples with the learned
            variance. A suffix ``@leading`` or ``@trailing`` changes the spacing of the timesteps
            from ``@linspace``, the default. The dpm++ family never visits timestep 0 except at the
            end of ``@trailing``. ``euler`` is for models that predict a flow, which need it.
        steps: number of steps T.
        process: the prediction type, and the process that the model was trained on.

    Raises:
        UsageError: the sampler is unknown, or a number is out of range.
    """
    check_goes_with(sampler, process)
    if sampler == FLOW_SAMPLER:
        return _even_flow_table(steps, process.prediction_type)
    family, at, spacing = sampler.partition("@")
    if at and spacing not in SPACINGS:
        raise UsageError(
            f"sampler {sampler!r}: unknown spacing {spacing!r}; use {', '.join(SPACINGS)}"
        )
    solve, visits_zero = solver_of(sampler, family)
    timesteps = spaced_timesteps(steps, spacing or SPACINGS[0], visits_zero=visits_zero)
    return solved_table(sampler, solve, timesteps, process)


def check_goes_with(sampler: str, process: Process) -> None:
    """Check that a sampler of this project can reverse the process.

    Raises:
        UsageError: the prediction type is unknown, the sampler is a folder's scheduler, or one of
            both is a flow and the other is not.
    """
    if process.prediction_type not in PREDICTION_TYPES:
        raise UsageError(
            f"unknown prediction type {process.prediction_type!r}; "
            f"use {', '.join(PREDICTION_TYPES)}"
        )
    if sampler == FOLDER_SAMPLER:
        raise UsageError(
            f"sampler {sampler!r} is the scheduler of a pipeline's folder; goc-plan and goc-export "
            "know it, here give a table or another sampler"
        )
    if (sampler == FLOW_SAMPLER) != (process.prediction_type in FLOW_PREDICTION_TYPES):
        raise UsageError(
            f"sampler {sampler!r} does not go with a model that predicts "
            f"{process.prediction_type!r}; use {FLOW_SAMPLER} for flow, and for no other"
        )


def solved_table(
    sampler: str, solve: Solver, timesteps: tuple[int, ...], process: Process
) -> SamplerTable:
    """Make the table of a solver along training timesteps, in falling order."""
    signal = process.signal_along(timesteps)
    updates = solve(signal)
    estimate = tuple(estimate_weights(process.prediction_type, s) for s in signal[:-1])
    lags = max(len(update.estimates) for update in updates) - 1
    return SamplerTable(
        sampler=sampler,
        prediction_type=process.prediction_type,
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


def _even_flow_table(steps: int, prediction: str) -> SamplerTable:
    """Make a table of even steps from noise to the clean sample.

    Source: Liu et al., "Flow Straight and Fast", ICLR 2023, eq. 1; Ma et al., "SiT", ECCV 2024,
    section 2.
    """
    check_steps(steps, TRAIN_STEPS)
    if prediction == "flow":
        return flow_table([step / steps for step in range(steps)], prediction)
    return flow_table([TRAIN_STEPS * (1 - step / steps) for step in range(steps)], prediction)


def flow_table(timesteps: Sequence[float], prediction: str) -> SamplerTable:
    """Make a table of Euler steps along the line between noise and the clean sample.

    Args:
        timesteps: [T] the model's time input, in sampling order. For ``flow`` it rises from 0
            (noise) to 1 (clean), and the model predicts ``clean - noise``. For ``flow_to_noise`` it
            falls from 1000 (noise) to 0 (clean), and the model predicts ``noise - clean``.
        prediction: ``flow`` or ``flow_to_noise``.
    """
    whole, clean = (1, 1.0) if prediction == "flow" else (TRAIN_STEPS, 0.0)
    times = [t / whole for t in timesteps]
    zeros = (0.0,) * len(times)
    return SamplerTable(
        sampler=FLOW_SAMPLER,
        prediction_type=prediction,
        timesteps=tuple(timesteps),
        latent=(1.0,) * len(times),
        model=tuple(after - now for now, after in pairwise((*times, clean))),
        noise=zeros,
        spread=zeros,
        estimate=tuple((1.0, clean - time) for time in times),
        lag_coefficients=((),) * len(times),
    )


def default_sampler(process: Process) -> str:
    """Return the SPEC of the default sampler: the one that came with the model, if any."""
    if process.scheduler is not None:
        return FOLDER_SAMPLER
    return FLOW_SAMPLER if process.prediction_type in FLOW_PREDICTION_TYPES else "ddim"


def sampler_misfit(table: SamplerTable, spec: ModelSpec) -> str | None:
    """Explain why a table cannot drive a model, or return None if it can."""
    if table.learned_variance and not spec.learn_sigma:
        return (
            f"sampler {table.sampler!r} needs the variance that this model does not predict; "
            "use ddim:1, which fixes it"
        )
    if table.prediction_type != spec.prediction_type:
        return (
            f"sampler {table.sampler!r} is made for a model that predicts {table.prediction_type}, "
            f"this one predicts {spec.prediction_type}"
        )
    return None


def solver_of(sampler: str, family: str) -> tuple[Solver, bool]:
    """Return the solver of a sampler without its spacing, and whether timestep 0 is a step.

    Raises:
        UsageError: the family is unknown, or its number is out of range.
    """
    name, colon, number = family.partition(":")
    if name == "ddim":
        eta = _number(sampler, "eta", number) if colon else 0.0
        if not 0 <= eta <= 1:
            raise UsageError(f"sampler {sampler!r}: eta must be within 0..1")
        return lambda signal: ddim_updates(signal, eta), True
    if name == "dpm++":
        order = _number(sampler, "order", number) if colon else 2
        if order not in (1, 2, 3):
            raise UsageError(f"sampler {sampler!r}: order must be 1, 2 or 3")
        return lambda signal: dpm_solver_updates(signal, int(order)), False
    if family == "ddpm":
        return ddpm_updates, True
    raise UsageError(f"unknown sampler {sampler!r}; use {SAMPLER_GRAMMAR}")


def _number(sampler: str, what: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"sampler {sampler!r}: {what} {text!r} is not a number") from None
