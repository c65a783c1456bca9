"""The addresses of what a head reads and keeps in each step."""

from __future__ import annotations

import math

from goc_deploy.compiler import Plan
from goc_deploy.protocols import Buffer, Move
from goc_deploy.runtime.head_buffers import HeadBuffers
from goc_deploy.runtime.request import Batch
from goc_deploy.samplers.head import Head
from goc_deploy.spec import ModelSpec

Shape = tuple[int, ...]


class HeadBinding:
    """What the head of a plan adds to its launches.

    A computed step keeps its model output and its normalised tokens; a collapsed step keeps
    nothing. Without shared launches, the kept tensors stay where they are, and each step reads them
    in place. With shared launches, place ``age`` has what was kept ``age`` computed steps ago, so
    that all steps of a kind read the same addresses. A computed step then begins by moving them one
    place on, see `moves`.

    Args:
        head: the head.
        buffers: its memory.
        plan: the plan, which decides which steps are computed.
        spec: sizes of the model.
        batch: shape of the run.
        shared: whether steps share launches.
    """

    def __init__(
        self,
        head: Head,
        buffers: HeadBuffers,
        plan: Plan,
        spec: ModelSpec,
        batch: Batch,
        *,
        shared: bool,
    ) -> None:
        self._head, self._buffers, self._shared = head, buffers, shared
        self._computed = [plan.step_kind(step) != "collapsed" for step in range(plan.steps)]
        self._output: Shape = (batch.rows, *spec.prediction)
        self._tokens: Shape = (batch.rows, spec.tokens, spec.hidden)

    def computes(self, step: int) -> bool:
        """Whether a step keeps something."""
        return self._computed[step]

    def prediction(self, step: int) -> Buffer:
        """Where a computed step writes its model output, (B, C_out, H, W)."""
        return self._kept(self._buffers.outputs, self._buffers.no_output, step, 0, self._output)

    def inputs(self, step: int, x: Buffer) -> dict[str, Buffer]:
        """The inputs of the sampler graph that it has because of the head.

        Args:
            step: index of the step.
            x: tokens before the final layer, (B, T, D).
        """
        buffers, form = self._buffers, self._head.form
        _, *weights = self._head.shape
        inputs = {"head": buffers.weights[step].view(*weights)}
        for age in range(1, form.outputs + 1):
            inputs[f"output_{age}"] = self._kept(
                buffers.outputs, buffers.no_output, step, age, self._output
            )
        if form.reads_tokens:
            inputs["x"] = x
        for age in range(1, form.tokens + 1):
            inputs[f"tokens_{age}"] = self._kept_tokens(step, age)
        return inputs

    def outputs(self, step: int) -> dict[str, Buffer]:
        """The outputs of the sampler graph that are kept because of the head."""
        if not self._computed[step] or not self._head.form.tokens:
            return {}
        return {"tokens": self._kept_tokens(step, 0)}

    def moves(self) -> list[Move]:
        """Moves by which a computed step ages what is kept; only with shared launches."""
        moves = []
        for ring, shape in self._rings():
            flat = [kept.view(1, 1, math.prod(shape)) for kept in ring]
            moves += [Move(flat[age - 1], flat[age]) for age in range(len(flat) - 1, 0, -1)]
        return moves

    def resets(self) -> tuple[tuple[Buffer, Buffer], ...]:
        """Copies of zeros to all that is read before a step has kept it; only with `moves`."""
        return tuple(
            (nothing.view(*shape), kept.view(*shape))
            for (ring, shape), nothing in zip(
                self._rings(), (self._buffers.no_output, self._buffers.no_tokens), strict=False
            )
            if nothing is not None
            for kept in ring[:-1]
        )

    def _rings(self) -> list[tuple[tuple[Buffer, ...], Shape]]:
        return [(self._buffers.outputs, self._output), (self._buffers.tokens, self._tokens)]

    def _kept_tokens(self, step: int, age: int) -> Buffer:
        buffers = self._buffers
        assert buffers.no_tokens is not None
        return self._kept(buffers.tokens, buffers.no_tokens, step, age, self._tokens)

    def _kept(
        self, ring: tuple[Buffer, ...], nothing: Buffer, step: int, age: int, shape: Shape
    ) -> Buffer:
        """What was kept ``age`` computed steps ago; 0 is the place of a computed step itself."""
        if self._shared:
            kept = ring[age if self._computed[step] else age - 1]
        else:
            before = sum(self._computed[:step])
            kept = ring[(before - age) % len(ring)] if age <= before else nothing
        return kept.view(*shape)
