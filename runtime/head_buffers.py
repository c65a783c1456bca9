"""The device memory of a plan with a head: its weights, and what it reads of earlier steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from goc_deploy.compiler import Plan
from goc_deploy.precision import ITEM_BYTES, Precision
from goc_deploy.protocols import Backend, Buffer
from goc_deploy.runtime.constants import aligned_size
from goc_deploy.samplers.head import HeadForm
from goc_deploy.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class HeadBuffers:
    """What a head reads, for up to ``capacity`` images.

    Attributes:
        weights: for each step, its weights in the constants, (F * P,) float32.
        outputs: model outputs of computed steps, (B, C_out, H, W) float32: one for each step that
            the head looks back, and one for the current step.
        no_output: zeros, in place of outputs before the first step.
        tokens: the same for normalised tokens (B, T, D); empty if the head keeps none.
        no_tokens: zeros, in place of tokens before the first step; None if the head keeps none.
    """

    weights: tuple[Buffer, ...]
    outputs: tuple[Buffer, ...]
    no_output: Buffer
    tokens: tuple[Buffer, ...]
    no_tokens: Buffer | None


def allocate_head_buffers(
    backend: Backend,
    spec: ModelSpec,
    dtype: str,
    form: HeadForm,
    capacity: int,
    weights: tuple[Buffer, ...],
) -> HeadBuffers:
    """Allocate the memory of a head.

    Args:
        backend: allocates the buffers.
        spec: sizes of the model.
        dtype: dtype of the tokens.
        form: what the head reads.
        capacity: the largest number of images N.
        weights: see `HeadBuffers`.
    """

    def kept(elements: int, dtype: str, count: int) -> tuple[tuple[Buffer, ...], Buffer]:
        nothing = backend.allocate((elements,), dtype)
        backend.upload(np.zeros(elements), nothing)
        return tuple(backend.allocate((elements,), dtype) for _ in range(count)), nothing

    outputs, no_output = kept(_output_size(spec, capacity), "float32", form.outputs + 1)
    tokens, no_tokens = (
        kept(_tokens_size(spec, capacity), dtype, form.tokens + 1) if form.tokens else ((), None)
    )
    return HeadBuffers(weights, outputs, no_output, tokens, no_tokens)


def head_bytes(spec: ModelSpec, precision: Precision, plan: Plan, capacity: int) -> int:
    """Bytes that a head takes: the weights of all steps, and what it keeps; 0 without a head."""
    head = plan.sampler.head
    if head is None:
        return 0
    form = head.form
    _, width, values = head.shape
    tokens = (form.tokens + 2) * _tokens_size(spec, capacity) if form.tokens else 0
    return (
        4 * plan.steps * aligned_size(width * values)
        + 4 * (form.outputs + 2) * _output_size(spec, capacity)
        + tokens * ITEM_BYTES[precision]
    )


def _output_size(spec: ModelSpec, capacity: int) -> int:
    return spec.rows_per_image * capacity * math.prod(spec.prediction)


def _tokens_size(spec: ModelSpec, capacity: int) -> int:
    return spec.rows_per_image * capacity * spec.tokens * spec.hidden
