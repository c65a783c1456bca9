"""A batch of images that advances through the sampler under a schedule, step by step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy

import numpy as np

from goc_deploy.compiler.values import features_of_units
from goc_deploy.runtime.calibration.stepper import Stepper
from goc_deploy.runtime.request import Request
from goc_deploy.schedule.schedule import HistoryKind, Level

Row = tuple[float, ...]
FeatureHook = Callable[[int, np.ndarray], None]


class Trajectory:
    """The latents and the history of one batch.

    Args:
        stepper: runs the units; trajectories may share it.
        request: the images.
        history: ``used`` or ``computed``, as in a schedule.
        depth: number of history entries per feature.
        level: ``unit`` or ``residual``, as in a schedule: what is a feature.
    """

    def __init__(
        self,
        stepper: Stepper,
        request: Request,
        history: HistoryKind,
        depth: int,
        level: Level = "unit",
    ) -> None:
        self._stepper, self._request = stepper, request
        self._pushes_predictions, self._depth = history == "used", depth
        self.latents = np.float32(stepper.table.start) * request.noise[:, 0]
        self._level = level
        self._features = features_of_units(stepper.spec)
        # By feature, or at index 0 those of the residual; newest first.
        self._entries: list[list[np.ndarray]] = [[] for _ in stepper.spec.features]
        self._estimates: list[np.ndarray] = []  # newest first
        self._scratch: np.ndarray = np.empty(0, np.float32)

    def advance(
        self, step: int, rows: Sequence[Row], on_feature: FeatureHook | None = None
    ) -> None:
        """Run one step.

        Args:
            step: index of the step.
            rows: coefficients of every unit; a unit with an empty row is computed.
            on_feature: called with (unit, feature) for every computed unit; the feature is a view
                (B, tokens, D) of all its features, one after the other.
        """
        stepper = self._stepper
        stepper.begin(step, self._request, self.latents, self._estimates)
        if self._level == "residual":
            self._advance_as_one(rows, on_feature)
        else:
            for unit, (row, of_unit) in enumerate(zip(rows, self._features, strict=True)):
                indices = [index for index, _ in of_unit]
                if row:
                    stepper.add(unit, (self._predicted(index, row) for index in indices))
                    continue
                for index, feature in zip(indices, self._computed(unit, on_feature), strict=True):
                    self._push(index, feature)
        self.latents, estimate = stepper.finish()
        if estimate is not None:
            self._estimates = [estimate, *self._estimates][: stepper.table.reach]

    def state(self) -> dict[str, np.ndarray]:
        """Everything that later steps read, by name; the arrays are not copied."""
        state = {"latents": self.latents}
        state |= {f"estimate {i}": estimate for i, estimate in enumerate(self._estimates)}
        for index, entries in enumerate(self._entries):
            state |= {f"entry {index} {i}": entry for i, entry in enumerate(entries)}
        return state

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Continue from a `state` of a trajectory of the same images."""
        self.latents = state["latents"]
        self._estimates = numbered(state, "estimate")
        self._entries = [numbered(state, f"entry {index}") for index in range(len(self._entries))]

    def fork(self) -> Trajectory:
        """Another trajectory of the same images that continues from the current step."""
        other = copy(self)
        other._entries = [[entry.copy() for entry in entries] for entries in self._entries]
        return other

    def _advance_as_one(self, rows: Sequence[Row], on_feature: FeatureHook | None) -> None:
        """Compute all units and keep the residual, or add the predicted residual."""
        stepper = self._stepper
        if rows[0]:
            stepper.skip(self._predicted(0, rows[0]))
            return
        start = stepper.start_tokens.astype(np.float32)
        for unit in range(len(rows)):
            self._computed(unit, on_feature)
        self._push(0, np.subtract(stepper.end_tokens, start, out=start))

    def _computed(self, unit: int, on_feature: FeatureHook | None) -> list[np.ndarray]:
        features = self._stepper.compute(unit)
        if on_feature:
            on_feature(unit, np.concatenate(features, axis=1) if features[1:] else features[0])
        return features

    def _predicted(self, index: int, row: Row) -> np.ndarray:
        """The prediction ``sum(c * h)``, a view; it joins the history of used features."""
        shape = self._entries[index][0].shape
        if self._scratch.shape != (2, *shape):
            self._scratch = np.empty((2, *shape), np.float32)
        predicted: np.ndarray = self._scratch[0]
        term: np.ndarray = self._scratch[1]
        first, *others = zip(row, self._entries[index], strict=False)
        np.multiply(first[1], first[0], out=predicted)
        for coefficient, entry in others:
            np.multiply(entry, coefficient, out=term)
            predicted += term
        if self._pushes_predictions:
            self._push(index, predicted)
        return predicted

    def _push(self, index: int, feature: np.ndarray) -> None:
        """Copy a feature into the history; the memory of the oldest entry is reused."""
        entries = self._entries[index]
        if not self._depth:
            return
        memory = (
            entries.pop() if len(entries) == self._depth else np.empty(feature.shape, np.float32)
        )
        memory[...] = feature
        entries.insert(0, memory)


def numbered(state: Mapping[str, np.ndarray], name: str) -> list[np.ndarray]:
    """The arrays ``NAME 0``, ``NAME 1``, ... of a state, as long as there are any."""
    arrays: list[np.ndarray] = []
    while f"{name} {len(arrays)}" in state:
        arrays.append(state[f"{name} {len(arrays)}"])
    return arrays
