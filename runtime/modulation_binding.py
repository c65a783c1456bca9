"""The addresses of the modulation of steps for a batch shape."""

from __future__ import annotations

from goc_deploy.compiler import Compute, Plan, Predict, Segment
from goc_deploy.protocols import Buffer
from goc_deploy.runtime.lookahead import chunk_steps, lookahead_of
from goc_deploy.runtime.modulation_buffers import ModulationBuffers
from goc_deploy.runtime.request import Batch
from goc_deploy.spec import ModelSpec


class ModulationBinding:
    """Where the modulation table, the rows of a step and the gates of later steps are.

    Args:
        buffers: the memory of the modulation.
        spec: sizes of the model.
        plan: the plan.
        batch: shape of the run.
        earlier: the modulation of the steps before those of this one, which have more rows, or
            None.
    """

    def __init__(
        self,
        buffers: ModulationBuffers,
        spec: ModelSpec,
        plan: Plan,
        batch: Batch,
        earlier: ModulationBinding | None = None,
    ) -> None:
        self._buffers, self._spec, self._plan, self._batch = buffers, spec, plan, batch
        self._earlier, self.lookahead = earlier, lookahead_of(plan)
        self.stop = batch.skip_steps.stop  # after it, a binding with fewer rows follows

    def used(self, step: int) -> range:
        """The rows of the modulation table that a step uses."""
        kinds = {type(op) for op in self._plan.launches[step]}
        by_unit = self._plan.schedule.level == "unit"  # residuals have no gates
        return self._spec.modulation.read(
            computes=bool(kinds & {Compute, Segment}), predicts=by_unit and Predict in kinds
        )

    def table_steps(self, step: int) -> list[int]:
        """The steps in the modulation table while a step runs, in the order of the table."""
        chunk = self._buffers.chunk
        return chunk_steps(self._plan, self.lookahead, step - step % chunk, chunk)

    def table(self, step: int) -> Buffer:
        """The table (S, M, R, D) while a step runs, see `table_steps`."""
        spec, steps = self._spec, len(self.table_steps(step))
        shape = (steps, spec.modulation.count, self._batch.labels, spec.hidden)
        return self._buffers.table.view(*shape)

    def timesteps(self, step: int) -> Buffer:
        """The timesteps (S,) of that table."""
        buffers, steps = self._buffers, len(self.table_steps(step))
        (whole,), chunks = buffers.timesteps.shape, -(-self._plan.steps // buffers.chunk)
        start = step // buffers.chunk * (whole // chunks)
        return buffers.timesteps.view(steps, start=start)

    def table_rows(self, place: int, used: range) -> Buffer:
        """Rows (rows, R, D) of the step at a place in the table."""
        spec, labels = self._spec, self._batch.labels
        start = (place * spec.modulation.count + used.start) * labels * spec.hidden
        return self._buffers.table.view(len(used), labels, spec.hidden, start=start)

    def row(self, row: int, count: int | None = None) -> Buffer:
        """A row (B, D) of the step's modulation, or several (count, B, D)."""
        rows, hidden = self._batch.rows, self._spec.hidden
        shape = (rows, hidden) if count is None else (count, rows, hidden)
        return self._buffers.rows.view(*shape, start=row * rows * hidden)

    def gates_of_step(self, later: int, feature: int, count: int) -> Buffer:
        """The gates (count, B, D) of features from ``feature`` on at a later step.

        B is the number of rows of the step that fetched them.
        """
        earlier = self._earlier
        if earlier is not None:
            before = self.lookahead.fetched[: earlier.stop]
            if any(later in steps for steps in before):
                return earlier.gates_of_step(later, feature, count)
        rows, hidden, modulation = self._batch.rows, self._spec.hidden, self._spec.modulation
        first = modulation.gates.index(modulation.gate(feature))
        return self._buffers.gates_ahead[self.lookahead.place[later]].view(
            count, rows, hidden, start=first * rows * hidden
        )
