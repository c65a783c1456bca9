"""The device memory of skip-layer guidance, in engines that have rows for it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from goc_deploy.precision import ITEM_BYTES, Precision
from goc_deploy.protocols import Backend, Buffer
from goc_deploy.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class SkipBuffers:
    """What skip-layer guidance reads, for up to ``capacity`` images N.

    Attributes:
        rows: (N,) row of each image without the skipped blocks.
        weights: (N, C) weight of the difference to it, of each channel of each image.
        no_weights: zeros, in place of weights in other steps.
        no_gates: zeros (N, D), which the rows get in place of the gates of the skipped blocks.
    """

    rows: Buffer
    weights: Buffer
    no_weights: Buffer
    no_gates: Buffer


def skip_bytes(spec: ModelSpec, precision: Precision, capacity: int) -> int:
    """Bytes that `allocate_skip_buffers` allocates, without the indices of rows."""
    return capacity * (8 * spec.channels + ITEM_BYTES[precision] * spec.hidden)


def allocate_skip_buffers(
    backend: Backend, spec: ModelSpec, dtype: str, capacity: int
) -> SkipBuffers:
    """Allocate the memory of skip-layer guidance.

    Args:
        backend: allocates the buffers.
        spec: sizes of the model.
        dtype: dtype of the modulation table.
        capacity: the largest number of images N.

    Raises:
        ResourceError: there is not enough memory.
    """

    def zeros(elements: int, dtype: str) -> Buffer:
        buffer = backend.allocate((elements,), dtype)
        backend.upload(np.zeros(elements), buffer)
        return buffer

    return SkipBuffers(
        rows=backend.allocate((capacity,), "int64"),
        weights=backend.allocate((capacity * spec.channels,), "float32"),
        no_weights=zeros(capacity * spec.channels, "float32"),
        no_gates=zeros(capacity * spec.hidden, dtype),
    )
