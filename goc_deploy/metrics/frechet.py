"""Frechet distance between two sets of features: FID and sFID."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Gaussian:
    """Mean (d,) and covariance (d, d) of features, float64."""

    mean: np.ndarray
    covariance: np.ndarray


class Moments:
    """Mean and covariance of features that are added in batches and not kept.

    Source: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing
    sample variances", 1979.
    """

    def __init__(self, width: int) -> None:
        self.count = 0
        self._mean = np.zeros(width)
        self._scatter = np.zeros((width, width))

    def add(self, features: np.ndarray) -> None:
        """Add (n, d) features."""
        if not len(features):
            return
        values = features.astype(np.float64)
        mean = values.mean(axis=0)
        centred, shift = values - mean, mean - self._mean
        total = self.count + len(values)
        self._scatter += centred.T @ centred + np.outer(shift, shift) * (
            self.count * len(values) / total
        )
        self._mean += shift * (len(values) / total)
        self.count = total

    def gaussian(self) -> Gaussian:
        """Return the fitted Gaussian, with the unbiased covariance as in ADM's evaluator.

        It needs at least two features.
        """
        return Gaussian(self._mean.copy(), self._scatter / (self.count - 1))


def gaussian_of(features: np.ndarray) -> Gaussian:
    """Fit a Gaussian to (N, d) features."""
    moments = Moments(features.shape[1])
    moments.add(features)
    return moments.gaussian()


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """``|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))``.

    The trace of the root is the sum of the roots of the eigenvalues of ``R S_b R``, where R is the
    symmetric root of S_a. These are real and not negative even if a covariance is singular, so its
    diagonal needs no offset.

    Source: Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash
    Equilibrium", 2017.
    """
    eigenvalues, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(np.maximum(eigenvalues, 0))) @ vectors.T
    mixed = np.linalg.eigvalsh(root @ b.covariance @ root)
    shift = a.mean - b.mean
    traces = np.trace(a.covariance) + np.trace(b.covariance)
    return float(shift @ shift + traces - 2 * np.sqrt(np.maximum(mixed, 0)).sum())
