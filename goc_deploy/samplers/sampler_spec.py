"""Samplers by their SPECs."""

from __future__ import annotations

from goc_deploy.errors import UsageError
from goc_deploy.samplers.flows import EULER, FLOW_SAMPLERS, flow_family, flow_timesteps
from goc_deploy.samplers.process import TRAIN_STEPS, Process
from goc_deploy.samplers.solvers import (
    SPACINGS,
    check_steps,
    ddim_updates,
    ddpm_updates,
    dpm_solver_updates,
    spaced_timesteps,
)
from goc_deploy.samplers.table import SamplerTable, Solver, flow_table, solved_table
from goc_deploy.spec import FLOW_PREDICTION_TYPES, PREDICTION_TYPES, ModelSpec

SAMPLER_GRAMMAR = (
    "ddim[:ETA] | dpm++[:ORDER] | ddpm, each with [@linspace | @leading | @trailing], for flow "
    "models euler | unipc, each with [@shift=S], or diffusers for the scheduler of the model's "
    "folder"
)
FLOW_SAMPLER = EULER  # the default for flows
FOLDER_SAMPLER = "diffusers"


def sampler_table(sampler: str, steps: int, process: Process) -> SamplerTable:
    """Make the table of a sampler of this project.

    For ``diffusers`` see `goc_deploy.exporters.schedulers.table_from_sampler`.

    Args:
        sampler: ``ddim`` or ``ddim:ETA`` with ETA in 0..1 (0 is deterministic); ``dpm++`` or
            ``dpm++:ORDER`` with ORDER 1 to 3 (default 2); ``ddpm``, which samples with the learned
            variance. A suffix ``@leading`` or ``@trailing`` changes the spacing of the timesteps
            from ``@linspace``, the default. The dpm++ family never visits timestep 0 except at the
            end of ``@trailing``. Models that predict a flow need ``euler`` or ``unipc``, also with
            ``@shift=S``, see `goc_deploy.samplers.flows.flow_timesteps`.
        steps: number of steps T.
        process: the prediction type, and the process that the model was trained on.

    Raises:
        UsageError: the sampler is unknown, or a number is out of range.
    """
    check_goes_with(sampler, process)
    if process.prediction_type in FLOW_PREDICTION_TYPES:
        check_steps(steps, TRAIN_STEPS)
        timesteps = flow_timesteps(sampler, steps, process.prediction_type)
        return flow_table(sampler, timesteps, process.prediction_type)
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
    of_flows = flow_family(sampler) in FLOW_SAMPLERS
    if of_flows != (process.prediction_type in FLOW_PREDICTION_TYPES):
        needed, others = (
            ("a flow", "ddim, dpm++ or ddpm")
            if of_flows
            else ("noise, a velocity or the clean sample", " or ".join(FLOW_SAMPLERS))
        )
        raise UsageError(
            f"sampler {sampler!r} needs a model that predicts {needed}, but this one predicts "
            f"{process.prediction_type!r}; use {others}"
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
    other_steps = table.reach or table.stochastic or table.prediction_type != "flow_to_noise"
    if table.size_shift is not None and other_steps:
        return f"sampler {table.sampler!r} has steps for every size, but takes no Euler steps"
    return None


def switch_step(table: SamplerTable, spec: ModelSpec) -> int | None:
    """The first step that the second set of weights of a model computes, or None.

    Source: diffusers' ``WanPipeline``, which compares the timestep with
    ``boundary_ratio * num_train_timesteps``.
    """
    below = (k for k, t in enumerate(table.timesteps) if t < spec.boundary * TRAIN_STEPS)
    return next(below, None)


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
