"""Numbers of floating point operations, computed from a model's sizes.

A multiply-add counts as two operations, as in papers. The counts include what grows with the steps:
the matrix products of units, patch embedding and final layer, and the sums of predictions.
Conditioning, text encoder and VAE run once per request and are not counted.
"""

from __future__ import annotations

from goc_deploy.schedule.schedule import Schedule
from goc_deploy.spec import ModelSpec


def product_flops(spec: ModelSpec, branch: str) -> tuple[int, ...]:
    """Count each matrix product of a unit, in execution order, for one row of the batch.

    The two products of attention count as one. Keys and values of a caption are computed once per
    request and are not counted.
    """
    tokens, hidden, inner = spec.tokens, spec.hidden, spec.mlp_hidden
    square = 2 * tokens * hidden * hidden
    if branch == "attn":
        return 3 * square, 4 * tokens * tokens * hidden, square
    if branch == "cross":
        return square, 4 * tokens * spec.caption_tokens * hidden, square
    return 2 * tokens * hidden * inner, 2 * tokens * inner * hidden


def patch_flops(spec: ModelSpec) -> int:
    """Count patch embedding and final layer, for one row of the batch."""
    return 2 * spec.tokens * spec.patch**2 * (spec.channels + spec.output_channels) * spec.hidden


def full_step_flops(spec: ModelSpec, rows: int) -> int:
    """Count a step that computes every unit, for ``rows`` rows of the batch."""
    block = sum(sum(product_flops(spec, branch)) for branch in spec.branches)
    return rows * (spec.depth * block + patch_flops(spec))


def schedule_flops(schedule: Schedule, spec: ModelSpec, rows: int) -> int:
    """Count all steps of a schedule for ``rows`` rows of the batch, two per guided image."""
    computed = [sum(product_flops(spec, branch)) for branch in spec.branches]
    of_entry = 2 * spec.tokens * spec.hidden
    total = schedule.steps * patch_flops(spec)
    for step, features in zip(schedule.coefficients, schedule.feature_rows, strict=True):
        total += of_entry * sum(map(len, features))
        total += sum(computed[unit % len(computed)] for unit, row in enumerate(step) if not row)
    return rows * total
