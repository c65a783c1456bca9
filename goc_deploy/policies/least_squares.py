"""Fitted coefficients: least squares with a pull toward plain reuse."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from goc_deploy.policies.fit import FitOptions
from goc_deploy.schedule import REUSE

__all__ = ["FitOptions", "NormalEquations", "solve"]

MAX_COEFFICIENT = 8.0


@dataclass(slots=True)
class NormalEquations:
    """Sums over images of ``V V^T`` and ``V t``, for a target t to be predicted from the rows of V.

    Attributes:
        gram: (n, n) float64.
        cross: (n,) float64.
    """

    gram: np.ndarray
    cross: np.ndarray

    @classmethod
    def zeros(cls, entries: int) -> NormalEquations:
        """Nothing seen yet."""
        return cls(np.zeros((entries, entries)), np.zeros(entries))

    def see(self, rows: list[np.ndarray], target: np.ndarray) -> None:
        """Add what predicts ``target`` in one batch."""
        for i, left in enumerate(rows):
            self.cross[i] += np.dot(left.ravel(), target.ravel())
            for j, right in enumerate(rows[: i + 1]):
                self.gram[i, j] += np.dot(left.ravel(), right.ravel())
                self.gram[j, i] = self.gram[i, j]


def solve(equations: NormalEquations, ridge: float) -> tuple[float, ...]:
    """Coefficients that minimize ``|c V - t|^2 + ridge * sum_i |V_i|^2 (c_i - p_i)^2``.

    p is plain reuse.
    Plain reuse itself where the result would be larger than ``MAX_COEFFICIENT`` or not finite: then
    the entries are so alike that their difference is noise.
    """
    entries = len(equations.cross)
    prior = np.zeros(entries)
    prior[0] = 1.0
    penalty = ridge * np.diag(np.maximum(np.diag(equations.gram), np.finfo(np.float64).tiny))
    try:
        found = np.linalg.solve(equations.gram + penalty, equations.cross + penalty @ prior)
    except np.linalg.LinAlgError:
        return REUSE
    if not np.all(np.abs(found) <= MAX_COEFFICIENT):
        return REUSE
    return tuple(float(c) for c in found)
