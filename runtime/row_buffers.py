"""The device memory that says which row of a batch, and of the modulation table, is of what."""

from __future__ import annotations

from dataclasses import dataclass

from goc_deploy.protocols import Backend, Buffer
from goc_deploy.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class RowBuffers:
    """Memory of the conditions and rows of up to N images.

    Attributes:
        labels: distinct labels, int64.
        label_rows: (B,) index of the row of the modulation table of each row.
        pooled: (K, P) float32, pooled embeddings of the captions, or None if the model reads none.
        images: (B,) image of each row.
        cond_rows: (N,) conditional row of each image.
        uncond_rows: (N,) unconditional row of each image.
    """

    labels: Buffer
    label_rows: Buffer
    pooled: Buffer | None
    images: Buffer
    cond_rows: Buffer
    uncond_rows: Buffer


def table_labels(spec: ModelSpec, capacity: int) -> int:
    """The largest number R of rows of a modulation table.

    These are the distinct labels and the null label. Captions have rows in the table only if the
    conditioning reads their pooled embeddings: two per image. Skip-layer guidance has one more per
    image.
    """
    rows = spec.rows_per_image * capacity
    if spec.pooled_channels:
        return rows
    return 1 if spec.one_modulation else rows - capacity + 1


def allocate_rows(backend: Backend, spec: ModelSpec, capacity: int) -> RowBuffers:
    """Allocate the memory of conditions and rows.

    Args:
        backend: allocates the buffers.
        spec: sizes of the model.
        capacity: the largest number of images N.

    Raises:
        ResourceError: there is not enough memory.
    """
    rows, pooled = spec.rows_per_image * capacity, spec.pooled_channels

    def indices(count: int) -> Buffer:
        return backend.allocate((count,), "int64")

    return RowBuffers(
        labels=indices(table_labels(spec, capacity)),
        label_rows=indices(rows),
        pooled=backend.allocate((rows * pooled,), "float32") if pooled else None,
        images=indices(rows),
        cond_rows=indices(capacity),
        uncond_rows=indices(capacity),
    )
