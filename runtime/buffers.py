"""All memory of a session, allocated once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from goc_deploy.compiler import Plan, Predict
from goc_deploy.precision import DTYPE_BYTES, DTYPE_OF_PRECISION, ITEM_BYTES, Precision
from goc_deploy.protocols import ALIGNMENT, Backend, Buffer
from goc_deploy.spec import ModelSpec

TABLE_BUDGET_BYTES = 512 * 2**20


@dataclass(frozen=True, slots=True)
class Buffers:
    """Device memory for one plan and up to ``capacity`` images.

    Attributes:
        chunk: steps after which the modulation table is filled again.
        table: modulation table of a chunk and of the steps that its last ones predict ahead, (steps, M, R, D).
        modulation: rows of the current step, (M, B, D).
        gates_ahead: gates of the steps that are predicted ahead, (U, B, D) each.
        tokens: two token buffers (B, T, D) that units alternate between.
        slots: history, one feature (B, T, D) each.
        accumulators: sums of gated predictions for steps ahead, (B, T, D) each.
        zeros: what an accumulator starts from, (B, T, D), or None where nothing is predicted ahead.
        latents: two latents buffers (N, C, H, W) float32 that steps alternate between.
        prediction: model output (B, C_out, H, W) float32.
        estimates: what a multistep sampler keeps of the last steps, (N, C, H, W) float32 each; one more than it reaches back.
        no_estimate: zeros, what it reads before there is anything.
        noise: fresh noise of each step for a stochastic sampler, else zeros once, (N, C, H, W) each, one after the other.
        constants: (T, `step_size`) float32, the numbers that differ from step to step; see `step_rows`.
        shared: where steps find theirs on a device that shares launches, else None.
        timesteps: a row per chunk, each at an aligned address.
        guidance: (N, C) guidance weight of each channel of each image.
        labels: distinct labels.
        label_rows, rows, cond_rows, uncond_rows: indices that expand labels, images and predictions to rows.
        captions: of a model that draws captions, else None.
    """

    chunk: int
    table: Buffer
    modulation: Buffer
    gates_ahead: tuple[Buffer, ...]
    tokens: tuple[Buffer, Buffer]
    slots: tuple[Buffer, ...]
    accumulators: tuple[Buffer, ...]
    zeros: Buffer | None
    latents: tuple[Buffer, Buffer]
    prediction: Buffer
    estimates: tuple[Buffer, ...]
    no_estimate: Buffer | None
    noise: Buffer
    constants: Buffer
    shared: SharedBuffers | None
    timesteps: Buffer
    guidance: Buffer
    labels: Buffer
    label_rows: Buffer
    rows: Buffer
    cond_rows: Buffer
    uncond_rows: Buffer
    captions: CaptionBuffers | None


@dataclass(frozen=True, slots=True)
class SharedBuffers:
    """What steps that are the same launches read, whichever step it is.

    Attributes:
        step: (1,) int32, the step that runs.
        constants: (`step_size`,) float32, its row of the constants.
        noise: (N, C, H, W) float32, its noise.
    """

    step: Buffer
    constants: Buffer
    noise: Buffer


@dataclass(frozen=True, slots=True)
class CaptionBuffers:
    """Device memory for up to K captions: two per image, without and with guidance.

    Attributes:
        embeds: (K, caption tokens, caption channels) float32.
        bias: (K, caption tokens) float32, added to attention scores.
        keys_values: keys, then values of each block, (2L, K, heads, caption tokens, head width).
        rows: (B,) which caption each row shows.
    """

    embeds: Buffer
    bias: Buffer
    keys_values: Buffer
    rows: Buffer


def table_labels(spec: ModelSpec, capacity: int) -> int:
    """Most rows R of a modulation table: distinct labels with the null label; captions do not enter it."""
    return 1 if spec.draws_captions else capacity + 1


def keys_values_shape(spec: ModelSpec, captions: int) -> tuple[int, int, int, int, int]:
    """Keys and values of every block."""
    return (2 * spec.depth, captions, spec.heads, spec.caption_tokens, spec.hidden // spec.heads)


def captions_of_block(
    spec: ModelSpec, captions: int, block: int, keys_values: Buffer, bias: Buffer, rows: Buffer
) -> dict[str, Buffer]:
    """What a branch of a block may read of the captions.

    Args:
        spec: the model.
        captions: K, distinct captions.
        block: which block.
        keys_values, bias: see `CaptionBuffers`.
        rows: (B,) which caption each row shows.
    """
    _, *shape = keys_values_shape(spec, captions)
    size = math.prod(shape)
    return {
        "keys": keys_values.view(*shape, start=2 * block * size),
        "values": keys_values.view(*shape, start=(2 * block + 1) * size),
        "bias": bias.view(captions, spec.caption_tokens),
        "caption_rows": rows,
    }


def aligned_size(count: int) -> int:
    """Float32 values to the next aligned address after ``count`` of them."""
    per_line = ALIGNMENT // DTYPE_BYTES["float32"]
    return -(-count // per_line) * per_line


def aligned_rows(rows: Sequence[Sequence[float]], size: int = 1) -> np.ndarray:
    """Rows one after the other, each from an aligned address on, as float32; filled up to ``size`` values with zeros."""
    starts = np.cumsum([0, *(aligned_size(len(row)) for row in rows)])
    values = np.zeros(max(size, starts[-1]), np.float32)
    for start, row in zip(starts, rows, strict=False):
        values[start : start + len(row)] = row
    return values


def step_rows(plan: Plan, step: int) -> list[Sequence[float]]:
    """The numbers of a step: its row of the sampler table, then the coefficients of each launch that predicts."""
    return [
        plan.sampler.rows[step],
        *(coefficient_row(op) for op in plan.launches[step] if isinstance(op, Predict)),
    ]


def step_size(plan: Plan) -> int:
    """Values from the constants of a step to those of the next: what the largest takes."""
    return max(
        sum(aligned_size(len(row)) for row in step_rows(plan, step)) for step in range(plan.steps)
    )


def coefficient_row(op: Predict) -> list[float]:
    """What a launch reads: the coefficients of its units, joined."""
    return [c for prediction in op.predictions for c in prediction.coefficients]


def planned_bytes(spec: ModelSpec, precision: Precision, plan: Plan, capacity: int) -> int:
    """Bytes that `allocate_buffers` takes, without its few kilobytes of indices."""
    item, rows = ITEM_BYTES[precision], 2 * capacity
    step_bytes = spec.modulation.count * table_labels(spec, capacity) * spec.hidden * item
    captions = (
        spec.caption_tokens
        * rows
        * (4 * (spec.caption_channels + 1) + 2 * spec.depth * spec.hidden * item)
    )
    chunk = _chunk_steps(step_bytes, plan)
    table = min(plan.steps, chunk + plan.accumulators) * step_bytes
    features = (2 + plan.cache_features) * rows * spec.tokens * spec.hidden * item
    pixels = spec.side**2 * capacity * 4
    noise = plan.steps + 1 if plan.sampler.stochastic else 1
    estimates = plan.sampler.reach + 2 if plan.sampler.reach else 0
    return (
        captions
        + table
        + (spec.modulation.count + plan.accumulators * len(spec.modulation.gates))
        * rows
        * spec.hidden
        * item
        + features
        + pixels * ((2 + noise + estimates) * spec.channels + 2 * spec.output_channels)
    )


def _chunk_steps(step_bytes: int, plan: Plan) -> int:
    return max(1, min(plan.steps, TABLE_BUDGET_BYTES // step_bytes - plan.accumulators))


def allocate_buffers(
    backend: Backend, spec: ModelSpec, precision: Precision, plan: Plan, capacity: int
) -> Buffers:
    """Allocate a session's memory and fill in what never changes.

    Raises:
        ResourceError: not enough memory.
    """
    dtype, rows = DTYPE_OF_PRECISION[precision], 2 * capacity
    table_row = table_labels(spec, capacity) * spec.hidden
    chunk = _chunk_steps(spec.modulation.count * table_row * ITEM_BYTES[precision], plan)
    feature, image = rows * spec.tokens * spec.hidden, spec.channels * spec.side**2

    def new(*shape: int, dtype: str = "float32") -> Buffer:
        return backend.allocate(shape, dtype)

    def constant(values: np.ndarray, dtype: str = "float32") -> Buffer:
        buffer = backend.allocate(values.shape, dtype)
        backend.upload(values, buffer)
        return buffer

    def rows_of(rows: Sequence[Sequence[float]]) -> Buffer:
        return constant(aligned_rows(rows))

    table = plan.sampler
    whole = chunk + plan.accumulators
    padded = (*table.timesteps, *[0.0] * whole)
    size = step_size(plan)
    noise = (
        new(plan.steps * aligned_size(capacity * image))
        if table.stochastic
        else constant(np.zeros(capacity * image))
    )
    constants = constant(
        np.stack([aligned_rows(step_rows(plan, step), size) for step in range(plan.steps)])
    )
    return Buffers(
        chunk=chunk,
        table=new(
            min(plan.steps, chunk + plan.accumulators) * spec.modulation.count * table_row,
            dtype=dtype,
        ),
        modulation=new(spec.modulation.count * rows * spec.hidden, dtype=dtype),
        gates_ahead=tuple(
            new(len(spec.modulation.gates) * rows * spec.hidden, dtype=dtype)
            for _ in range(plan.accumulators)
        ),
        tokens=(new(feature, dtype=dtype), new(feature, dtype=dtype)),
        slots=tuple(new(feature, dtype=dtype) for _ in range(plan.slots)),
        accumulators=tuple(new(feature, dtype=dtype) for _ in range(plan.accumulators)),
        zeros=constant(np.zeros(feature), dtype) if plan.accumulators else None,
        latents=(new(capacity * image), new(capacity * image)),
        prediction=new(rows * spec.output_channels * spec.side**2),
        estimates=tuple(
            new(capacity * image) for _ in range(table.reach + 1 if table.reach else 0)
        ),
        no_estimate=constant(np.zeros(capacity * image)) if table.lags else None,
        noise=noise,
        constants=constants,
        shared=SharedBuffers(
            step=new(1, dtype="int32"),
            constants=new(size),
            noise=new(capacity * image) if table.stochastic else noise,
        )
        if backend.device.shares_launches
        else None,
        timesteps=rows_of([padded[first : first + whole] for first in range(0, plan.steps, chunk)]),
        guidance=new(capacity * spec.channels),
        labels=new(capacity + 1, dtype="int64"),
        label_rows=new(rows, dtype="int64"),
        rows=new(rows, dtype="int64"),
        cond_rows=new(capacity, dtype="int64"),
        uncond_rows=new(capacity, dtype="int64"),
        captions=CaptionBuffers(
            embeds=new(rows * spec.caption_tokens * spec.caption_channels),
            bias=new(rows * spec.caption_tokens),
            keys_values=new(*keys_values_shape(spec, rows), dtype=dtype),
            rows=new(rows, dtype="int64"),
        )
        if spec.draws_captions
        else None,
    )
