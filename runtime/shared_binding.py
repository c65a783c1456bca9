"""A plan bound so that steps of the same kind share launches and addresses.

A CUDA graph contains addresses. If each step read its values at their own addresses, each step
would need its own CUDA graph. Therefore a step begins by moving the values that differ from step to
step to common addresses: its rows of the modulation table, its coefficients, its noise, and the
results of earlier steps. A counter on the device selects the step. All other launches are the
same for all steps that launch the same engines on the same history, and are recorded once.
"""

from __future__ import annotations

import math
from typing import Any

from goc_deploy.protocols import Buffer, Device, Move, Run
from goc_deploy.runtime.binding import Binder
from goc_deploy.runtime.bound import BoundLaunch
from goc_deploy.runtime.buffers import SharedBuffers
from goc_deploy.runtime.constants import aligned_size


class SharedBinder(Binder):
    """A `Binder` for a device that shares launches."""

    def __init__(self, device: Device, *args: Any) -> None:
        super().__init__(*args)
        self._device = device

    @property
    def _places(self) -> SharedBuffers:
        assert self._buffers.shared is not None
        return self._buffers.shared

    def _start(self, step: int) -> list[BoundLaunch]:
        """One launch that moves all values of the step."""
        used, head = self.modulation.used(step), self._head
        aging = head if head is not None and head.computes(step) else None

        def bind() -> Run:
            moves = [self._modulation_of(used), *self._numbers(), *self._left()]
            moves += [] if aging is None else aging.moves()
            return self._device.step_start(moves, self._places.step, self._stream)

        return [self._launches.own("start", (used, aging is not None), bind)]

    def _modulation_of(self, used: range) -> Move:
        """Rows of the modulation table, expanded to the batch."""
        spec = self._spec
        return Move(
            self.modulation.table_rows(0, used),
            self.modulation.row(used.start, len(used)),
            period=self._buffers.modulation.chunk,
            stride=spec.modulation.count * self._batch.labels * spec.hidden,
            rows=self._buffers.rows.label_rows.view(self._batch.rows),
        )

    def _numbers(self) -> list[Move]:
        """Moves of the coefficients and the noise of a step."""
        plan, places, buffers = self._plan, self._places, self._buffers
        (size,), elements = places.constants.shape, math.prod(self._latents_shape)
        moves = [
            Move(
                buffers.constants.view(1, 1, size),
                places.constants.view(1, 1, size),
                plan.steps,
                size,
            )
        ]
        if plan.sampler.stochastic:
            noise = buffers.noise.view(1, 1, elements)
            moves.append(
                Move(noise, places.noise.view(1, 1, elements), plan.steps, aligned_size(elements))
            )
        return moves

    def _left(self) -> list[Move]:
        """Moves of the latents and estimates of the preceding step; estimates age by one step."""
        reach, elements = self._plan.sampler.reach, math.prod(self._latents_shape)
        pairs = [(self._latents_out(0), self._latents(0))]
        pairs += [
            (self._estimate(0, lag - 1), self._estimate(0, lag)) for lag in range(reach, 0, -1)
        ]
        return [
            Move(source.view(1, 1, elements), target.view(1, 1, elements))
            for source, target in pairs
        ]

    def _latents(self, step: int) -> Buffer:  # noqa: ARG002
        return self._buffers.latents[0].view(*self._latents_shape)

    def _latents_out(self, step: int) -> Buffer:  # noqa: ARG002
        return self._buffers.latents[1].view(*self._latents_shape)

    def _initial(self) -> Buffer:
        return self._latents_out(0)

    def _noise(self, step: int) -> Buffer:  # noqa: ARG002
        return self._places.noise.view(*self._latents_shape)

    def _estimate(self, step: int, lag: int) -> Buffer:  # noqa: ARG002
        return self._buffers.estimates[lag].view(*self._latents_shape)

    def _resets(self) -> tuple[tuple[Buffer, Buffer], ...]:
        """Copies of zeros to all that the first steps read of steps before the first."""
        nothing, reach = self._buffers.no_estimate, self._plan.sampler.reach
        resets = () if self._head is None else self._head.resets()
        if nothing is None:
            return resets
        return resets + tuple(
            (nothing.view(*self._latents_shape), self._estimate(0, lag)) for lag in range(reach + 1)
        )
