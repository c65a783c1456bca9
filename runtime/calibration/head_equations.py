"""Ridge regression from streamed normal equations, with a penalty that held-out rows choose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# As a share of the mean square of a feature. Neighbouring steps are nearly equal, so that what they
# differ in is far below their own size.
PENALTIES = tuple(10.0**exponent for exponent in range(-10, 1))


@dataclass(slots=True)
class RidgeEquations:
    """Sums over rows of ``w z z^T``, ``w z r^T`` and ``w |r|^2`` with weights w.

    They are what a linear map from features z to targets r needs, so memory does not grow with the
    number of rows.

    Attributes:
        gram: (F, F) float64.
        cross: (F, P) float64.
        square: the sum of ``w |r|^2``.
        weight: the sum of the weights.
    """

    gram: np.ndarray
    cross: np.ndarray
    square: float = 0.0
    weight: float = 0.0

    @classmethod
    def zeros(cls, features: int, targets: int) -> RidgeEquations:
        """The sums over no rows."""
        return cls(np.zeros((features, features)), np.zeros((features, targets)))

    def see(self, features: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> None:
        """Add rows.

        Args:
            features: (n, F).
            targets: (n, P).
            weights: (n,), not negative.
        """
        roots = np.sqrt(weights.astype(np.float64))[:, None]
        z, r = features * roots, targets * roots
        self.gram += z.T @ z
        self.cross += z.T @ r
        self.square += float(np.vdot(r, r))
        self.weight += float(weights.sum())

    def loss(self, solution: np.ndarray) -> float:
        """The weighted sum of ``|r - W^T z|^2`` of a map W, (F, P)."""
        explained = self.gram @ solution - 2 * self.cross
        return max(0.0, self.square + float(np.vdot(solution, explained)))

    def solve(self, penalty: float) -> np.ndarray:
        """The map W (F, P) float64 that minimizes the loss and the penalty.

        The penalty is ``penalty * weight * sum_j s_j^2 |W_j|^2``, where ``s_j^2`` is the weighted
        mean square of feature j, so the scale of a feature does not matter. A feature that is zero
        in all rows gets zero weights.

        Args:
            penalty: a positive number.
        """
        scale = np.sqrt(np.diag(self.gram))
        scale[scale == 0] = 1.0
        system = self.gram / scale / scale[:, None]
        system[np.diag_indices_from(system)] += penalty
        return np.asarray(np.linalg.solve(system, self.cross / scale[:, None]) / scale[:, None])


def best_ridge(
    train: RidgeEquations, held_out: RidgeEquations, penalties: Sequence[float] = PENALTIES
) -> tuple[float, np.ndarray]:
    """The penalty whose solution has the least held-out loss, and the solution (F, P) float64.

    Of equal losses the larger penalty wins.
    """
    solved = ((penalty, train.solve(penalty)) for penalty in sorted(penalties, reverse=True))
    return min(solved, key=lambda pair: held_out.loss(pair[1]))
