"""Precision and recall of samples and reference images, from balls around their features."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

NEIGHBOUR = 3
BLOCK_ROWS = 1000


def precision_and_recall(
    samples: np.ndarray, reference: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Find the images within the manifold of the other set.

    The manifold of a set is the union of balls that reach to the third neighbour of each image.

    Args:
        samples: (N, d) features, more than 3.
        reference: (M, d) features, more than 3.

    Returns:
        (N,) booleans whose mean is the precision, and (M,) whose mean is the recall.

    Source: Kynkaanniemi et al., "Improved Precision and Recall Metric for Assessing Generative
    Models", 2019.
    """
    return _covered(samples, reference), _covered(reference, samples)


def _covered(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Return for each point whether the ball of at least one centre contains it."""
    radii = np.concatenate(
        [np.partition(d, NEIGHBOUR, axis=1)[:, NEIGHBOUR] for d in _squared(centres, centres)]
    )
    return np.concatenate([(d <= radii).any(axis=1) for d in _squared(points, centres)])


def _squared(points: np.ndarray, centres: np.ndarray) -> Iterator[np.ndarray]:
    """Yield squared distances to all centres, a block of points at a time."""
    # Relative to the centres' mean: otherwise the difference of two large float32 numbers would
    # lose the digits that distinguish neighbours.
    middle = centres.mean(axis=0, dtype=np.float64)
    centred = (centres - middle).astype(np.float64)
    sizes = np.square(centred).sum(axis=1)
    for first in range(0, len(points), BLOCK_ROWS):
        block = (points[first : first + BLOCK_ROWS] - middle).astype(np.float64)
        squared = np.square(block).sum(axis=1)[:, None] + sizes - 2 * (block @ centred.T)
        yield np.maximum(squared, 0)
