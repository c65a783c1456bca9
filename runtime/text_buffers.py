"""The device memory of the stream of the text, in models whose units change it."""

from __future__ import annotations

from dataclasses import dataclass

from goc_deploy.compiler import Plan
from goc_deploy.precision import ITEM_BYTES, Precision
from goc_deploy.protocols import Backend, Buffer
from goc_deploy.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class TextBuffers:
    """Device memory of the stream of the text, for up to B rows.

    Attributes:
        start: the tokens (B, Lc, D) at the start of every step, which captions are turned into once
            per request.
        tokens: two token buffers (B, Lc, D), used alternately by the launches.
        slots: the history, one feature (B, Lc, D) per slot.
        accumulators: sums of gated predictions for later steps, (B, Lc, D) each.
    """

    start: Buffer
    tokens: tuple[Buffer, Buffer]
    slots: tuple[Buffer, ...]
    accumulators: tuple[Buffer, ...]


def text_bytes(spec: ModelSpec, precision: Precision, plan: Plan, capacity: int) -> int:
    """Bytes that `allocate_text_buffers` allocates for ``capacity`` images."""
    if not spec.has_text_stream:
        return 0
    rows = spec.rows_per_image * capacity
    one = rows * spec.caption_tokens * spec.hidden * ITEM_BYTES[precision]
    return (3 + plan.text_features) * one


def allocate_text_buffers(
    backend: Backend, spec: ModelSpec, dtype: str, plan: Plan, rows: int
) -> TextBuffers | None:
    """Allocate the stream of the text; None if the model has none.

    Args:
        backend: allocates the buffers.
        spec: sizes of the model.
        dtype: dtype of the tokens.
        plan: the plan that the session runs.
        rows: the largest number of rows B.

    Raises:
        ResourceError: there is not enough memory.
    """
    if not spec.has_text_stream:
        return None

    def new() -> Buffer:
        return backend.allocate((rows * spec.caption_tokens * spec.hidden,), dtype)

    return TextBuffers(
        start=new(),
        tokens=(new(), new()),
        slots=tuple(new() for _ in range(plan.text_slots)),
        accumulators=tuple(new() for _ in range(plan.text_accumulators)),
    )
