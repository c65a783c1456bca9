"""The device memory of the modulation: its table, and what steps take out of the table."""

from __future__ import annotations

from dataclasses import dataclass

from goc_deploy.compiler import Plan
from goc_deploy.modulation import TABLE_BUDGET_BYTES
from goc_deploy.precision import DTYPE_OF_PRECISION, ITEM_BYTES, Precision
from goc_deploy.protocols import Backend, Buffer
from goc_deploy.runtime.constants import timesteps_from_plan
from goc_deploy.runtime.lookahead import Lookahead, lookahead_of, table_steps
from goc_deploy.runtime.row_buffers import table_labels
from goc_deploy.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class ModulationBuffers:
    """Memory of the modulation of a plan.

    Attributes:
        chunk: number of steps after which the modulation table is filled again.
        table: modulation table of a chunk and of the later steps whose gates are fetched in it,
            (steps, M, R, D).
        timesteps: one row per chunk, each at an aligned address.
        rows: rows of the current step, (M, B, D).
        gates_ahead: gates of later steps that are predicted for, (U, B, D) each.
    """

    chunk: int
    table: Buffer
    timesteps: Buffer
    rows: Buffer
    gates_ahead: tuple[Buffer, ...]


def modulation_bytes(spec: ModelSpec, precision: Precision, plan: Plan, capacity: int) -> int:
    """Bytes that `allocate_modulation` allocates, without the timesteps."""
    rows = spec.modulation.count + lookahead_of(plan).places * len(spec.modulation.gates)
    step_bytes, lookahead = _step_bytes(spec, precision, capacity), lookahead_of(plan)
    table = table_steps(plan, lookahead, _chunk_steps(step_bytes, plan, lookahead)) * step_bytes
    return table + rows * spec.rows_per_image * capacity * spec.hidden * ITEM_BYTES[precision]


def allocate_modulation(
    backend: Backend,
    spec: ModelSpec,
    precision: Precision,
    plan: Plan,
    capacity: int,
    chunk: int | None,
) -> ModulationBuffers:
    """Allocate the memory of the modulation, and upload the timesteps.

    Args:
        backend: allocates the buffers.
        spec: sizes of the model.
        precision: precision of the engines.
        plan: the plan that the session runs.
        capacity: the largest number of images N.
        chunk: number of steps for which the table is computed at a time; None for as many as
            ``TABLE_BUDGET_BYTES`` allow.

    Raises:
        ResourceError: there is not enough memory.
    """
    lookahead, dtype = lookahead_of(plan), DTYPE_OF_PRECISION[precision]
    step_bytes = _step_bytes(spec, precision, capacity)
    if chunk is None:
        chunk = _chunk_steps(step_bytes, plan, lookahead)
    table = table_steps(plan, lookahead, chunk) * step_bytes // ITEM_BYTES[precision]
    row = spec.rows_per_image * capacity * spec.hidden
    gates = len(spec.modulation.gates) * row
    timesteps = timesteps_from_plan(plan, chunk)
    buffer = backend.allocate(timesteps.shape, "float32")
    backend.upload(timesteps, buffer)
    return ModulationBuffers(
        chunk=chunk,
        table=backend.allocate((table,), dtype),
        timesteps=buffer,
        rows=backend.allocate((spec.modulation.count * row,), dtype),
        gates_ahead=tuple(backend.allocate((gates,), dtype) for _ in range(lookahead.places)),
    )


def _step_bytes(spec: ModelSpec, precision: Precision, capacity: int) -> int:
    """Size of the modulation of one step in the table."""
    labels = table_labels(spec, capacity)
    return spec.modulation.count * labels * spec.hidden * ITEM_BYTES[precision]


def _chunk_steps(step_bytes: int, plan: Plan, lookahead: Lookahead) -> int:
    """The largest chunk whose table is within its budget; at least one step."""
    most = min(plan.steps, TABLE_BUDGET_BYTES // step_bytes)
    fitting = (n for n in range(most, 1, -1) if table_steps(plan, lookahead, n) <= most)
    return next(fitting, 1)
