"""A plan bound so that steps of a kind are the same launches on the same addresses.

A CUDA graph holds addresses. If each step read its own values where they lie, each step would be a graph of its own. So a
step begins by moving what differs from step to step to one place: its rows of the modulation table, its numbers, its
noise, and what the step before it left. A counter on the device tells which step it is. All else is the same for every
step that launches the same engines on the same history, and is recorded once.
"""

from __future__ import annotations

import math
from typing import Any

from goc_deploy.protocols import Buffer, Device, Move
from goc_deploy.runtime.binding import Binder
from goc_deploy.runtime.bound import BoundLaunch
from goc_deploy.runtime.buffers import SharedBuffers, modulation_rows
from goc_deploy.runtime.constants import aligned_size


class SharedBinder(Binder):
    """See `Binder`; for a device that shares launches. Nothing is predicted ahead there."""

    def __init__(self, device: Device, *args: Any) -> None:
        super().__init__(*args)
        assert not self._plan.accumulators, "gates of later steps would not be there"
        self._device = device

    @property
    def _places(self) -> SharedBuffers:
        assert self._buffers.shared is not None
        return self._buffers.shared

    def _start(self, step: int) -> list[BoundLaunch]:
        """One launch that moves everything."""
        used = self._used_modulation(step)
        key = ("start", used)
        if key not in self._known:
            moves = (self._modulation_of(used), *self._numbers(), *self._left())
            run = self._device.step_start(moves, self._places.step, self._stream)
            self._known[key] = BoundLaunch("start", run)
        return [self._known[key]]

    def _modulation_of(self, used: range) -> Move:
        """Rows of the modulation table, expanded to the batch."""
        spec, labels, rows = self._spec, self._batch.labels, self._batch.rows
        source = self._buffers.table.view(
            len(used), labels, spec.hidden, start=used.start * labels * spec.hidden
        )
        return Move(
            source,
            self._modulation_row(used.start, len(used)),
            period=self._buffers.chunk,
            stride=modulation_rows(spec) * labels * spec.hidden,
            rows=self._buffers.label_rows.view(rows),
        )

    def _numbers(self) -> list[Move]:
        """The step's numbers, and its noise."""
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
        """What the step before left: its latents, and estimates, which all grow older by a step."""
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
        """Before the first step there were no estimates."""
        nothing, reach = self._buffers.no_estimate, self._plan.sampler.reach
        if nothing is None:
            return ()
        return tuple(
            (nothing.view(*self._latents_shape), self._estimate(0, lag)) for lag in range(reach + 1)
        )
