"""The device memory of a session, allocated once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from goc_deploy.blocks import TokenStream
from goc_deploy.compiler import Plan
from goc_deploy.precision import DTYPE_OF_PRECISION, ITEM_BYTES, Precision
from goc_deploy.protocols import Backend, Buffer
from goc_deploy.runtime.constants import (
    aligned_size,
    constants_from_plan,
    views_of_step,
)
from goc_deploy.runtime.head_buffers import HeadBuffers, allocate_head_buffers, head_bytes
from goc_deploy.runtime.modulation_buffers import (
    ModulationBuffers,
    allocate_modulation,
    modulation_bytes,
)
from goc_deploy.runtime.row_buffers import RowBuffers, allocate_rows
from goc_deploy.runtime.skip_buffers import SkipBuffers, allocate_skip_buffers, skip_bytes
from goc_deploy.runtime.stream_buffers import StreamBuffers, allocate_stream, stream_bytes
from goc_deploy.size_inputs import size_shapes
from goc_deploy.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Buffers:
    """Device memory for one plan and up to ``capacity`` images.

    Attributes:
        modulation: the modulation table, and what steps take out of it.
        rows: the conditions, and which row is of what.
        tokens: two token buffers (B, T, D), used alternately by the launches.
        start: the tokens (B, T, D) before all units, which the residual of a step is measured from,
            or None if the plan keeps no residuals.
        ones: gates (B, D) of a predicted residual, or None likewise.
        slots: the history, one feature (B, T, D) per slot.
        accumulators: sums of gated predictions for steps ahead, (B, T, D) each.
        zeros: initial value of an accumulator, (B, T, D), or None if no prediction is made ahead.
        latents: two latents buffers (N, C, H, W) float32, used alternately by the steps.
        prediction: model output (B, C_out, H, W) float32 of a step that keeps none.
        estimates: estimates of a multistep sampler, (N, C, H, W) float32 each: one for each step
            that it reaches back, and one for the current step.
        no_estimate: zeros, in place of estimates before the first step.
        noise: fresh noise of each step for a stochastic sampler, (N, C, H, W) each, one after the
            other; else zeros of one step.
        constants: (T, S) float32, the numbers that differ from step to step; see
            `goc_deploy.runtime.constants`.
        sampler_rows: for each step, its row of the sampler table.
        coefficients: for each step and launch, the coefficients; None if the launch predicts
            nothing.
        shared: common buffers of the steps if the device shares launches, else None.
        guidance: (N, C) guidance weight of each channel of each image; (2, N, C) if the model has
            two sets of weights.
        embedded_guidance: (1,) float32, guidance scale that the conditioning reads.
        captions: buffers of a text-conditional model, else None.
        text: the stream of the text, or None if the model has none.
        reference: the stream of the reference images, or None if the model reads none.
        patches: (N, R, C*p*p) float32, the patches of the reference images, or None likewise.
        head: what the head of the plan reads and keeps, or None without a head.
        skips: what skip-layer guidance reads, or None if the engines have no rows for it.
        of_size: what tells graphs the current size of a sample, by the name of the input.
    """

    modulation: ModulationBuffers
    rows: RowBuffers
    tokens: tuple[Buffer, Buffer]
    start: Buffer | None
    ones: Buffer | None
    slots: tuple[Buffer, ...]
    accumulators: tuple[Buffer, ...]
    zeros: Buffer | None
    latents: tuple[Buffer, Buffer]
    prediction: Buffer
    estimates: tuple[Buffer, ...]
    no_estimate: Buffer | None
    noise: Buffer
    constants: Buffer
    sampler_rows: tuple[Buffer, ...]
    coefficients: tuple[tuple[Buffer | None, ...], ...]
    shared: SharedBuffers | None
    guidance: Buffer
    embedded_guidance: Buffer
    captions: CaptionBuffers | None
    text: StreamBuffers | None
    reference: StreamBuffers | None
    patches: Buffer | None
    head: HeadBuffers | None
    skips: SkipBuffers | None
    of_size: Mapping[str, Buffer]

    @property
    def others(self) -> Mapping[TokenStream, StreamBuffers]:
        """The streams beside the image."""
        streams: dict[TokenStream, StreamBuffers | None] = {
            "text": self.text,
            "reference": self.reference,
        }
        return {stream: buffers for stream, buffers in streams.items() if buffers is not None}


@dataclass(frozen=True, slots=True)
class SharedBuffers:
    """Buffers that all steps read if they share launches.

    Attributes:
        step: (1,) int32, the current step.
        constants: (S,) float32, row of the constants of the current step.
        noise: (N, C, H, W) float32, noise of the current step.
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
        keys_values: keys, then values of each block, (2L, K, heads, caption tokens, head width), or
            None if no unit reads them.
        rows: (B,) index of the caption of each row.
    """

    embeds: Buffer
    bias: Buffer
    keys_values: Buffer | None
    rows: Buffer


def keys_values_shape(spec: ModelSpec, captions: int) -> tuple[int, int, int, int, int]:
    """The shape of the keys and values of every block."""
    return (2 * spec.depth, captions, spec.heads, spec.caption_tokens, spec.hidden // spec.heads)


def captions_of_block(
    spec: ModelSpec,
    captions: int,
    block: int,
    keys_values: Buffer | None,
    bias: Buffer,
    rows: Buffer,
) -> dict[str, Buffer]:
    """The tensors of the captions that a branch of a block may read, by name.

    Args:
        spec: sizes of the model.
        captions: K, number of distinct captions.
        block: index of the block.
        keys_values: keys and values, see `CaptionBuffers`.
        bias: bias of the scores, see `CaptionBuffers`.
        rows: (B,) index of the caption of each row.
    """
    offered = {"bias": bias.view(captions, spec.caption_tokens), "caption_rows": rows}
    if keys_values is None:
        return offered
    _, *shape = keys_values_shape(spec, captions)
    size = math.prod(shape)
    return {
        **offered,
        "keys": keys_values.view(*shape, start=2 * block * size),
        "values": keys_values.view(*shape, start=(2 * block + 1) * size),
    }


def planned_bytes(spec: ModelSpec, precision: Precision, plan: Plan, capacity: int) -> int:
    """Bytes that `allocate_buffers` allocates, without a few kilobytes of indices."""
    item, rows = ITEM_BYTES[precision], spec.rows_per_image * capacity
    keys_values = 0 if spec.has_text_stream else 2 * spec.depth * spec.hidden * item
    captions = spec.caption_tokens * rows * (4 * (spec.caption_channels + 1) + keys_values)
    pooled = 4 * rows * spec.pooled_channels
    features = (2 + plan.cache_features) * rows * spec.tokens * spec.hidden * item
    ones = 1 if plan.keeps_residuals else 0
    of_size = sum(4 * math.prod(shape) for shape in size_shapes(spec).values())
    pixels = math.prod(spec.sample) * capacity * 4
    noise = plan.steps + 1 if plan.sampler.stochastic else 1
    estimates = plan.sampler.reach + 2 if plan.sampler.reach else 0
    return (
        captions
        + pooled
        + stream_bytes(spec, precision, plan, capacity)
        + 4 * capacity * spec.tokens_of("reference") * spec.patch_values
        + (skip_bytes(spec, precision, capacity) if spec.skip_guidance_layers else 0)
        + of_size
        + modulation_bytes(spec, precision, plan, capacity)
        + ones * rows * spec.hidden * item
        + features
        + pixels
        * ((2 + noise + estimates) * spec.channels + spec.rows_per_image * spec.output_channels)
        + head_bytes(spec, precision, plan, capacity)
    )


def allocate_buffers(
    backend: Backend,
    spec: ModelSpec,
    precision: Precision,
    plan: Plan,
    capacity: int,
    chunk: int | None = None,
) -> Buffers:
    """Allocate the memory of a session and upload the constants.

    Args:
        backend: allocates the buffers.
        spec: sizes of the model.
        precision: precision of the engines.
        plan: the plan that the session runs.
        capacity: the largest number of images N.
        chunk: number of steps for which the modulation table is computed at a time; None for as
            many as ``TABLE_BUDGET_BYTES`` allow.

    Raises:
        ResourceError: there is not enough memory.
    """
    dtype, rows = DTYPE_OF_PRECISION[precision], spec.rows_per_image * capacity
    feature, image = rows * spec.tokens * spec.hidden, math.prod(spec.latents)

    def new(*shape: int, dtype: str = "float32") -> Buffer:
        return backend.allocate(shape, dtype)

    def constant(values: np.ndarray, dtype: str = "float32") -> Buffer:
        buffer = backend.allocate(values.shape, dtype)
        backend.upload(values, buffer)
        return buffer

    table = plan.sampler
    noise = (
        new(plan.steps * aligned_size(capacity * image))
        if table.stochastic
        else constant(np.zeros(capacity * image))
    )
    constants = constant(constants_from_plan(plan))
    shared = _shared_buffers(backend, constants, capacity * image, noise, plan)
    sampler_rows, weights, coefficients = _numbers(plan, constants, shared)
    return Buffers(
        modulation=allocate_modulation(backend, spec, precision, plan, capacity, chunk),
        rows=allocate_rows(backend, spec, capacity),
        tokens=(new(feature, dtype=dtype), new(feature, dtype=dtype)),
        start=new(feature, dtype=dtype) if plan.keeps_residuals else None,
        ones=constant(np.ones(rows * spec.hidden), dtype) if plan.keeps_residuals else None,
        slots=tuple(new(feature, dtype=dtype) for _ in range(plan.slots)),
        accumulators=tuple(new(feature, dtype=dtype) for _ in range(plan.accumulators)),
        zeros=constant(np.zeros(feature), dtype) if plan.predicts_ahead else None,
        latents=(new(capacity * image), new(capacity * image)),
        prediction=new(rows * math.prod(spec.prediction)),
        estimates=tuple(
            new(capacity * image) for _ in range(table.reach + 1 if table.reach else 0)
        ),
        no_estimate=constant(np.zeros(capacity * image)) if table.lags else None,
        noise=noise,
        constants=constants,
        sampler_rows=sampler_rows,
        coefficients=coefficients,
        shared=shared,
        guidance=new((2 if spec.boundary else 1) * capacity * spec.channels),
        embedded_guidance=new(1),
        captions=_caption_buffers(backend, spec, rows, dtype) if spec.text_conditional else None,
        text=allocate_stream("text", backend, spec, dtype, plan, rows),
        reference=allocate_stream("reference", backend, spec, dtype, plan, rows),
        patches=new(capacity * spec.tokens_of("reference") * spec.patch_values)
        if spec.max_references
        else None,
        head=None
        if table.head is None
        else allocate_head_buffers(backend, spec, dtype, table.head.form, capacity, weights),
        skips=allocate_skip_buffers(backend, spec, dtype, capacity)
        if spec.skip_guidance_layers
        else None,
        of_size={name: new(*shape) for name, shape in size_shapes(spec).items()},
    )


def _shared_buffers(
    backend: Backend, constants: Buffer, elements: int, noise: Buffer, plan: Plan
) -> SharedBuffers | None:
    """The common buffers of all steps; None if the device does not share launches."""
    if not backend.device.shares_launches:
        return None
    return SharedBuffers(
        step=backend.allocate((1,), "int32"),
        constants=backend.allocate(constants.shape[1:], "float32"),
        noise=backend.allocate((elements,), "float32") if plan.sampler.stochastic else noise,
    )


def _numbers(
    plan: Plan, constants: Buffer, shared: SharedBuffers | None
) -> tuple[tuple[Buffer, ...], tuple[Buffer, ...], tuple[tuple[Buffer | None, ...], ...]]:
    """The sampler row of each step, the weights of its head, and the launches' coefficients."""
    _, size = constants.shape
    own = [constants.view(size, start=step * size) for step in range(plan.steps)]
    views = [
        views_of_step(plan, step, shared.constants if shared else row)
        for step, row in enumerate(own)
    ]
    return (
        tuple(sampler for sampler, _, _ in views),
        tuple(head for _, head, _ in views if head is not None),
        tuple(launches for _, _, launches in views),
    )


def _caption_buffers(backend: Backend, spec: ModelSpec, rows: int, dtype: str) -> CaptionBuffers:
    return CaptionBuffers(
        embeds=backend.allocate((rows * spec.caption_tokens * spec.caption_channels,), "float32"),
        bias=backend.allocate((rows * spec.caption_tokens,), "float32"),
        keys_values=None
        if spec.has_text_stream
        else backend.allocate(keys_values_shape(spec, rows), dtype),
        rows=backend.allocate((rows,), "int64"),
    )
