"""The addresses of what skip-layer guidance reads, and the gates that it closes."""

from __future__ import annotations

from collections.abc import Sequence

from goc_deploy.protocols import Buffer, Stream
from goc_deploy.runtime.bound import BoundLaunch
from goc_deploy.runtime.request import Batch
from goc_deploy.runtime.skip_buffers import SkipBuffers
from goc_deploy.spec import ModelSpec


class SkipBinding:
    """What skip-layer guidance adds to the launches of a batch shape.

    Until its last step, every image has a third row: the conditional one, with gates of its own. A
    block whose gates are zero leaves the tokens as they are. So the units run as they do without
    it, and the history of these rows is that of a model without the blocks.

    Args:
        buffers: its memory.
        spec: sizes of the model.
        batch: shape of the run.
    """

    def __init__(self, buffers: SkipBuffers, spec: ModelSpec, batch: Batch) -> None:
        self._buffers, self._spec, self._batch = buffers, spec, batch

    def inputs(self, step: int, cond_rows: Buffer) -> dict[str, Buffer]:
        """The inputs of the sampler graph that it has because of the guidance.

        Args:
            step: index of the step. In other steps than those of the guidance, all weights are 0.
            cond_rows: (N,) conditional row of each image.
        """
        acts = step in self._batch.skip_steps
        weights = self._buffers.weights if acts else self._buffers.no_weights
        return {
            "skipped_rows": self._buffers.rows.view(self._batch.images) if acts else cond_rows,
            "skip_guidance": weights.view(self._batch.images, self._spec.channels),
        }

    def close_gates(self, table: Buffer, steps: Sequence[int], stream: Stream) -> BoundLaunch:
        """Set the gates of the skipped blocks to zero in the last N rows R of the table.

        Args:
            table: the modulation table (S, M, R, D), flat.
            steps: the steps in the table, in its order.
            stream: the stream of the launches.
        """
        spec, images, labels = self._spec, self._batch.images, self._batch.labels
        shape = (images, spec.hidden)
        zeros = self._buffers.no_gates.view(*shape)
        rows = [
            (place * spec.modulation.count + gate + 1) * labels - images
            for place, step in enumerate(steps)
            if step < self._batch.skip_steps.stop
            for gate in spec.skipped_gates
        ]
        closed = [table.view(*shape, start=row * spec.hidden) for row in rows]

        def run() -> None:
            for gates in closed:
                stream.copy(zeros, gates)

        return BoundLaunch("close gates", run)
