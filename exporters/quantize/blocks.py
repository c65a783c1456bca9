"""Symmetric quantisation of a matrix by blocks, in NumPy."""

from __future__ import annotations

import numpy as np

from goc_deploy.errors import ModelError
from goc_deploy.precision import ELEMENT_TYPES
from goc_deploy.protocols import NUMPY_DTYPES, float32_from_bfloat16

BLOCK = 32  # rows of a block; a larger one saves up to 1/32 of the size and adds 10 to 20 % error


def quantized_blocks(
    matrix: np.ndarray, dtype: str, scale_dtype: str, block: int = BLOCK
) -> tuple[np.ndarray, np.ndarray]:
    """Quantise every ``block`` rows of each column with a scale of their own.

    A value v becomes ``round(v / scale)``. The scale is the largest absolute value of the block
    divided by 127.5 (``int8``) or 7.5 (``int4``), so both ends of the range are used and no value
    is off by more than half a scale.

    Args:
        matrix: (K, N) float32, where K is a multiple of ``block``.
        dtype: ``int8`` or ``int4``.
        scale_dtype: dtype of the scales: ``float32``, ``float16`` or ``bfloat16``.
        block: number of rows with a scale of their own; K is one scale per column.

    Returns:
        Integers (K, N) int8, and scales (K / block, N); scales in ``bfloat16`` are uint16.

    Raises:
        ModelError: a value is not finite.
    """
    if not np.isfinite(matrix).all():
        raise ModelError("a weight to be quantised is infinite or not a number; check the weights")
    rows, columns = matrix.shape
    blocks = matrix.reshape(rows // block, block, columns)
    half = 2 ** (ELEMENT_TYPES[dtype].bits - 1)
    largest = np.abs(blocks).max(axis=1)
    exact = np.where(largest == 0, np.float32(1), largest / np.float32(half - 0.5))
    stored = rounded_up(exact, scale_dtype)
    scales = float32_scales(stored)
    integers = np.rint(blocks / scales[:, None]).clip(-half, half - 1).astype(np.int8)
    return integers.reshape(rows, columns), stored


def dequantized_blocks(integers: np.ndarray, stored: np.ndarray) -> np.ndarray:
    """Return the float32 matrix (K, N) that quantised values stand for."""
    rows, columns = integers.shape
    blocks = integers.reshape(len(stored), rows // len(stored), columns)
    values: np.ndarray = blocks * float32_scales(stored)[:, None]
    return values.reshape(rows, columns)


def float32_scales(stored: np.ndarray) -> np.ndarray:
    """Return scales in float32; an array of uint16 holds ``bfloat16`` values."""
    return float32_from_bfloat16(stored) if stored.dtype == np.uint16 else stored.astype(np.float32)


def packed(integers: np.ndarray, dtype: str) -> np.ndarray:
    """Return integers as the bytes of a weights file; two of 4 bits share a byte, low half first.

    Args:
        integers: int8; for ``int4`` an even number of them.
        dtype: ``int8`` or ``int4``.
    """
    flat = integers.reshape(-1).view(np.uint8)
    return flat if dtype == "int8" else (flat[0::2] & 15) | (flat[1::2] << 4)


def rounded_up(scales: np.ndarray, dtype: str) -> np.ndarray:
    """Convert float32 scales; a smaller scale would not reach the largest value of its block."""
    scales = scales.astype(np.float32)
    if dtype == "bfloat16":
        bits = scales.view(np.uint32)
        return ((bits + 0xFFFF) >> 16).astype(np.uint16)
    nearest = scales.astype(NUMPY_DTYPES[dtype])
    return np.where(
        nearest.astype(np.float32) < scales,
        np.nextafter(nearest, nearest.dtype.type(np.inf)),
        nearest,
    )
