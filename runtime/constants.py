"""The numbers that differ from step to step: a row of the sampler table, and coefficients.

Each step has a row of float32 values: its row of the sampler table, the weights of its head, then
the coefficients of each launch that predicts, in order. Each part starts at an aligned address.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from goc_deploy.compiler import Accumulate, Launch, Plan, Predict
from goc_deploy.precision import DTYPE_BYTES
from goc_deploy.protocols import ALIGNMENT, Buffer
from goc_deploy.runtime.lookahead import chunk_steps, lookahead_of, table_steps
from goc_deploy.samplers.head_features import head_weights

Numbers = Sequence[float] | np.ndarray


def aligned_size(count: int) -> int:
    """The smallest multiple of the alignment, in float32 values, that is at least ``count``."""
    per_line = ALIGNMENT // DTYPE_BYTES["float32"]
    return -(-count // per_line) * per_line


def aligned_rows(rows: Sequence[Numbers], size: int = 1) -> np.ndarray:
    """Join rows as float32, each at an aligned address, padded with zeros to ``size`` values."""
    starts = np.cumsum([0, *(aligned_size(len(row)) for row in rows)])
    values = np.zeros(max(size, starts[-1]), np.float32)
    for start, row in zip(starts, rows, strict=False):
        values[start : start + len(row)] = row
    return values


def step_rows(plan: Plan, step: int) -> list[Numbers]:
    """A step's row of the sampler table, the weights of its head, then a row per launch.

    The row of the head is empty without a head, and that of a launch if it predicts nothing.
    """
    head = plan.sampler.head
    weights: Numbers = () if head is None else head_weights(head)[step].ravel()
    return [plan.sampler.rows[step], weights, *map(coefficient_row, plan.launches[step])]


def coefficient_row(op: Launch) -> list[float]:
    """The coefficients of a launch: those of its units, joined, or those of its taps."""
    if isinstance(op, Accumulate):
        return [tap.coefficient for tap in op.taps]
    if not isinstance(op, Predict):
        return []
    return [c for prediction in op.predictions for c in prediction.coefficients]


def constants_from_plan(plan: Plan) -> np.ndarray:
    """The rows of all steps, (T, S) float32; S is the size of the largest row."""
    steps = [step_rows(plan, step) for step in range(plan.steps)]
    size = max(sum(aligned_size(len(row)) for row in rows) for rows in steps)
    return np.stack([aligned_rows(rows, size) for rows in steps])


def timesteps_from_plan(plan: Plan, chunk: int) -> np.ndarray:
    """The timesteps of each chunk of the modulation table, float32, each at an aligned address.

    Args:
        plan: the plan.
        chunk: number of steps of a chunk.
    """
    lookahead = lookahead_of(plan)
    whole, told = table_steps(plan, lookahead, chunk), plan.sampler.timesteps
    chunks = [chunk_steps(plan, lookahead, first, chunk) for first in range(0, plan.steps, chunk)]
    rows = [[told[step] for step in steps] for steps in chunks]
    return aligned_rows([row + [0.0] * (whole - len(row)) for row in rows])


def views_of_step(
    plan: Plan, step: int, constants: Buffer
) -> tuple[Buffer, Buffer | None, tuple[Buffer | None, ...]]:
    """Views of the numbers of a step in its row of the constants.

    Args:
        plan: the plan.
        step: index of the step.
        constants: (S,) float32, the row.

    Returns:
        The row of the sampler table; the weights of the head (F * P,), or None without a head; and
        for each launch its coefficients, or None if the launch predicts nothing.
    """
    rows = step_rows(plan, step)
    starts = accumulate((aligned_size(len(row)) for row in rows), initial=0)
    sampler, head, *launches = (
        constants.view(len(row), start=start) if len(row) else None
        for row, start in zip(rows, starts, strict=False)
    )
    assert sampler is not None
    return sampler, head, tuple(launches)
