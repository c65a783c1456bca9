"""Numbers of floating point operations, computed from a model's sizes.

A multiply-add counts as two operations, as in papers. The counts include what grows with the steps:
the matrix products of units, patch embedding and final layer, and the sums of predictions.
Conditioning, text encoder and VAE run once per request and are not counted.
"""

from __future__ import annotations

from goc_deploy.blocks import Unit
from goc_deploy.schedule.schedule import Schedule
from goc_deploy.spec import ModelSpec


def product_flops(spec: ModelSpec, unit: Unit) -> tuple[int, ...]:
    """Count each matrix product of a unit, in execution order, for one row of the batch.

    The two products of attention count as one. Keys and values of a caption are computed once per
    request and are not counted.
    """
    hidden, inner, branch = spec.hidden, spec.mlp_hidden, unit.branch
    tokens = sum(map(spec.tokens_of, unit.reads))
    square = 2 * tokens * hidden * hidden
    attention = 3 * square, 4 * tokens * tokens * hidden, square
    mlp = 2 * tokens * hidden * inner, 2 * tokens * inner * hidden
    if branch == "cross":
        return square, 4 * tokens * spec.caption_tokens * hidden, square
    return {"attn": attention, "mlp": mlp, "single": (*attention, *mlp)}[branch]


def patch_flops(spec: ModelSpec) -> int:
    """Count patch embedding and final layer, for one row of the batch."""
    return 2 * spec.tokens * spec.patch**2 * (spec.channels + spec.output_channels) * spec.hidden


def full_step_flops(spec: ModelSpec, rows: int) -> int:
    """Count a step that computes every unit, for ``rows`` rows of the batch."""
    units = sum(sum(product_flops(spec, unit)) for unit in spec.declared_units)
    return rows * (units + patch_flops(spec))


def schedule_flops(schedule: Schedule, spec: ModelSpec, rows: int) -> int:
    """Count all steps of a schedule for ``rows`` rows of the batch, two per guided image."""
    computed = [sum(product_flops(spec, unit)) for unit in spec.declared_units]
    of_entry = 2 * spec.tokens * spec.hidden
    total = schedule.steps * patch_flops(spec)
    for step, features in zip(schedule.coefficients, schedule.feature_rows, strict=True):
        total += of_entry * sum(map(len, features))
        total += sum(work for work, row in zip(computed, step, strict=True) if not row)
    return rows * total
