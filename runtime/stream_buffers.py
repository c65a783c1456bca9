"""The device memory of the streams beside the image, in models whose units read them."""

from __future__ import annotations

from dataclasses import dataclass

from goc_deploy.blocks import TokenStream
from goc_deploy.compiler import Plan
from goc_deploy.precision import ITEM_BYTES, Precision
from goc_deploy.protocols import Backend, Buffer
from goc_deploy.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class StreamBuffers:
    """Device memory of a stream of n tokens per sample, for up to B rows.

    Attributes:
        start: the tokens (B, n, D) at the start of every step, which captions or reference images
            are turned into once per request.
        tokens: two token buffers (B, n, D), used alternately by the launches.
        slots: the history, one feature (B, n, D) per slot.
        accumulators: sums of gated predictions for later steps, (B, n, D) each.
    """

    start: Buffer
    tokens: tuple[Buffer, Buffer]
    slots: tuple[Buffer, ...]
    accumulators: tuple[Buffer, ...]


def stream_bytes(spec: ModelSpec, precision: Precision, plan: Plan, capacity: int) -> int:
    """Bytes that `allocate_stream` allocates for all streams but the image's.

    Args:
        spec: sizes of the model.
        precision: precision of the tokens.
        plan: the plan that the session runs.
        capacity: the largest number of images N.
    """
    others = (stream for stream in spec.streams if stream != "image")
    tokens = sum((3 + plan.features_of(stream)) * spec.tokens_of(stream) for stream in others)
    return spec.rows_per_image * capacity * tokens * spec.hidden * ITEM_BYTES[precision]


def allocate_stream(
    stream: TokenStream, backend: Backend, spec: ModelSpec, dtype: str, plan: Plan, rows: int
) -> StreamBuffers | None:
    """Allocate a stream beside the image; None if no unit of the model reads it.

    Args:
        stream: the stream.
        backend: allocates the buffers.
        spec: sizes of the model.
        dtype: dtype of the tokens.
        plan: the plan that the session runs.
        rows: the largest number of rows B.

    Raises:
        ResourceError: there is not enough memory.
    """
    if stream not in spec.streams:
        return None

    def new() -> Buffer:
        return backend.allocate((rows * spec.tokens_of(stream) * spec.hidden,), dtype)

    return StreamBuffers(
        start=new(),
        tokens=(new(), new()),
        slots=tuple(new() for _ in range(plan.slots_of(stream))),
        accumulators=tuple(new() for _ in range(plan.accumulators_of(stream))),
    )
