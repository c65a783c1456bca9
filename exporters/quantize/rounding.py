"""Rounding to the values that a dtype of quantised products can hold."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

# Largest absolute value; int8 also has -128, which is used where it is nearest.
LARGEST: Mapping[str, float] = {"int8": 127.0, "float8_e4m3fn": 448.0}


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """Round float32 values to the nearest ones that a dtype can hold, which saturate.

    Args:
        values: finite float32 values of any shape, in units of their scale.
        dtype: ``int8`` or ``float8_e4m3fn``.
    """
    if dtype == "int8":
        return np.rint(values).clip(-128, 127).astype(np.float32)
    nearest = _float8(values).to(torch.float32).numpy()
    return np.asarray(nearest)


def encoded(values: np.ndarray, dtype: str) -> np.ndarray:
    """Return `rounded` values as the elements of a weights file: int8, or uint8 for float8."""
    if dtype == "int8":
        return values.astype(np.int8)
    return np.asarray(_float8(values).view(torch.uint8).numpy())


def _float8(values: np.ndarray) -> torch.Tensor:
    largest = LARGEST["float8_e4m3fn"]
    clipped = np.ascontiguousarray(values.clip(-largest, largest), np.float32)
    return torch.from_numpy(clipped).to(torch.float8_e4m3fn)
