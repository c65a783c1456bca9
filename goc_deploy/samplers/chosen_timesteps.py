"""Sampler tables on timesteps that the caller chooses, and their refinement."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from math import ceil

from goc_deploy.errors import UsageError
from goc_deploy.samplers.flows import FLOW_SAMPLERS
from goc_deploy.samplers.process import TRAIN_STEPS, Process
from goc_deploy.samplers.sampler_spec import FLOW_SAMPLER, check_goes_with, solver_of
from goc_deploy.samplers.table import SamplerTable, flow_table, solved_table
from goc_deploy.spec import FLOW_PREDICTION_TYPES

REFINED_STEPS = 250
_ROUNDING = 1e-9  # a share of substeps that is whole but for rounding is not one more substep


def table_at(sampler: str, timesteps: Sequence[float], process: Process) -> SamplerTable:
    """Make the table of a sampler that visits these timesteps, and then the clean sample.

    Args:
        sampler: ``ddim``, ``dpm++`` or ``dpm++:ORDER``; ``euler`` or ``unipc`` for models that
            predict a flow.
        timesteps: [T] the model's time input, in sampling order, without repeats. Training
            timesteps are whole and fall within 999..0. The time of a ``flow`` rises from 0 (noise)
            and stays below 1; that of ``flow_to_noise`` falls from at most 1000 and stays above 0.
        process: the prediction type, and the process that the model was trained on.

    Raises:
        UsageError: the sampler is unknown, draws fresh noise, has a spacing of its own or is a
            folder's scheduler; or the timesteps are not as above.
    """
    check_goes_with(sampler, process)
    _check_timesteps(f"sampler {sampler!r}", timesteps, process.prediction_type)
    if "@" in sampler:
        raise UsageError(
            f"sampler {sampler!r} has a spacing, but its timesteps are chosen; "
            f"use {sampler.partition('@')[0]}"
        )
    if sampler in FLOW_SAMPLERS:
        return flow_table(sampler, timesteps, process.prediction_type)
    solve, _ = solver_of(sampler, sampler)
    table = solved_table(sampler, solve, tuple(map(int, timesteps)), process)
    if table.stochastic:
        raise UsageError(
            f"sampler {sampler!r} draws fresh noise, which chosen timesteps do not support; "
            "use ddim or dpm++"
        )
    return table


def refined_table(
    table: SamplerTable, process: Process, steps: int = REFINED_STEPS
) -> tuple[SamplerTable, tuple[int, ...]]:
    """Make a DDIM table, Euler for flows, that visits every timestep of a table and many between.

    Its latents approach the exact solution of the probability flow as ``steps`` grows. Where a step
    of ``table`` begins, they can be compared with those of ``table`` from the same noise. Both end
    at the clean sample.

    Args:
        table: a table without fresh noise whose latents are those of ``process``.
        process: the process of ``table``.
        steps: the least number of steps of the refined table. Each step of ``table`` gets a share
            in proportion to the time that it takes, rounded up.

    Returns:
        The refined table, and T + 1 indices: of its step that begins where each step of ``table``
        begins, then its number of steps, which is the end.

    Raises:
        UsageError: ``table`` draws fresh noise, scales its latents, predicts something else than
            ``process``, or has timesteps that `table_at` refuses; or there are fewer training
            timesteps than ``steps``.

    Source: Song et al., "Score-Based Generative Modeling through Stochastic Differential
    Equations", ICLR 2021, eq. 13 (probability flow).
    """
    where = f"the table of sampler {table.sampler!r}"
    _check_refinable(where, table, process)
    flows = table.prediction_type in FLOW_PREDICTION_TYPES
    # The clean sample follows timestep 0 as one more timestep.
    end = (1.0 if table.prediction_type == "flow" else 0.0) if flows else -1
    nodes = [*table.timesteps, end]
    span = abs(end - nodes[0])
    if steps < 1 or (not flows and steps > span):
        raise UsageError(
            f"{where} starts at timestep {nodes[0]}, so it can be refined to 1..{span:g} steps, "
            f"got {steps}"
        )
    shares = [ceil(abs(b - a) * steps / span - _ROUNDING) for a, b in pairwise(nodes)]
    timesteps = [
        now + part * (after - now) / share if flows else now - part * int(now - after) // share
        for (now, after), share in zip(pairwise(nodes), shares, strict=True)
        for part in range(share)
    ]
    refined = table_at(FLOW_SAMPLER if flows else "ddim", timesteps, process)
    return refined, tuple(accumulate(shares, initial=0))


def _check_refinable(where: str, table: SamplerTable, process: Process) -> None:
    """Check that the exact solution of the process has the latents of a table.

    Raises:
        UsageError: as for `refined_table`.
    """
    if table.stochastic:
        raise UsageError(
            f"{where} draws fresh noise, so no converged solution has its latents; use a sampler "
            "without noise, such as ddim or dpm++"
        )
    if table.start != 1:
        raise UsageError(
            f"{where} scales its latents by {table.start:g}, so they are not those of the model's "
            "process; use a sampler that does not, such as ddim, dpm++ or euler"
        )
    if table.prediction_type != process.prediction_type:
        raise UsageError(
            f"{where} is made for a model that predicts {table.prediction_type}, the process is "
            f"that of {process.prediction_type}"
        )
    _check_timesteps(where, table.timesteps, table.prediction_type)


def _check_timesteps(where: str, timesteps: Sequence[float], prediction: str) -> None:
    """Check that timesteps are in sampling order, without repeats, and in the model's range."""
    rising = prediction == "flow"
    if prediction in FLOW_PREDICTION_TYPES:
        legal = "within [0, 1)" if rising else f"within (0, {TRAIN_STEPS}]"
        fits = all(0 <= t < 1 if rising else 0 < t <= TRAIN_STEPS for t in timesteps)
    else:
        legal = f"whole numbers within 0..{TRAIN_STEPS - 1}"
        fits = all(t in range(TRAIN_STEPS) for t in timesteps)
    ordered = all(a < b if rising else a > b for a, b in pairwise(timesteps))
    if not (timesteps and fits and ordered):
        raise UsageError(
            f"{where}: timesteps {', '.join(f'{t:g}' for t in timesteps)!r:.80} must be {legal}, "
            f"{'rising' if rising else 'falling'} without repeats"
        )
