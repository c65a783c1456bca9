"""How far apart arrays are."""

from __future__ import annotations

import numpy as np


def relative_l2(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def worst_step(found: np.ndarray, expected: np.ndarray) -> float:
    return max(relative_l2(f, e) for f, e in zip(found, expected, strict=True))
