"""A batch of images that advances through the sampler under a schedule, step by step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy

import numpy as np

from goc_deploy.runtime.calibration.stepper import Stepper
from goc_deploy.runtime.request import Request
from goc_deploy.schedule.schedule import HistoryKind

Row = tuple[float, ...]
FeatureHook = Callable[[int, np.ndarray], None]


class Trajectory:
    """The latents and the history of one batch.

    Args:
        stepper: runs the units; trajectories may share it.
        request: the images.
        history: ``used`` or ``computed``, as in a schedule.
        depth: number of history entries per unit.
    """

    def __init__(
        self, stepper: Stepper, request: Request, history: HistoryKind, depth: int
    ) -> None:
        self._stepper, self._request = stepper, request
        self._pushes_predictions, self._depth = history == "used", depth
        self.latents = np.float32(stepper.table.start) * request.noise[:, 0]
        self._entries: list[list[np.ndarray]] = [
            [] for _ in range(stepper.spec.units)
        ]  # newest first
        self._estimates: list[np.ndarray] = []  # newest first
        self._scratch: np.ndarray = np.empty(0, np.float32)

    def advance(
        self, step: int, rows: Sequence[Row], on_feature: FeatureHook | None = None
    ) -> None:
        """Run one step.

        Args:
            step: index of the step.
            rows: coefficients of every unit; a unit with an empty row is computed.
            on_feature: called with (unit, feature) for every computed unit; the feature is a view.
        """
        stepper = self._stepper
        stepper.begin(step, self._request, self.latents, self._estimates)
        for unit, row in enumerate(rows):
            if row:
                self._predict(unit, row)
                continue
            feature = stepper.compute(unit)
            self._push(unit, feature)
            if on_feature:
                on_feature(unit, feature)
        self.latents, estimate = stepper.finish()
        if estimate is not None:
            self._estimates = [estimate, *self._estimates][: stepper.table.reach]

    def fork(self) -> Trajectory:
        """Another trajectory of the same images that continues from the current step."""
        other = copy(self)
        other._entries = [[entry.copy() for entry in entries] for entries in self._entries]
        return other

    def _predict(self, unit: int, row: Row) -> None:
        """Add the gated prediction, ``gate * sum(c * h)``."""
        shape = self._stepper.feature_shape
        if self._scratch.shape != (2, *shape):
            self._scratch = np.empty((2, *shape), np.float32)
        predicted: np.ndarray = self._scratch[0]
        term: np.ndarray = self._scratch[1]
        first, *others = zip(row, self._entries[unit], strict=False)
        np.multiply(first[1], first[0], out=predicted)
        for coefficient, entry in others:
            np.multiply(entry, coefficient, out=term)
            predicted += term
        self._stepper.add(unit, predicted)
        if self._pushes_predictions:
            self._push(unit, predicted)

    def _push(self, unit: int, feature: np.ndarray) -> None:
        """Copy a feature into the history; the memory of the oldest entry is reused."""
        entries = self._entries[unit]
        if not self._depth:
            return
        memory = (
            entries.pop() if len(entries) == self._depth else np.empty(feature.shape, np.float32)
        )
        memory[...] = feature
        entries.insert(0, memory)
