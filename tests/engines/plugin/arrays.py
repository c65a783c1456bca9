"""Tensors for the plugin's tests, and what NumPy makes of them."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from goc_deploy.engines.plugin.kernel import Stack

NUMPY_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
EPSILON = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}


def tensor(values: np.ndarray, dtype: str, *, skew: int = 0) -> np.ndarray:
    """The values in memory that starts ``skew`` elements after a multiple of 64 bytes."""
    item = np.dtype(NUMPY_DTYPES[dtype]).itemsize
    memory = np.zeros(values.size * item + 64 + skew * item, np.uint8)
    start = -memory.ctypes.data % 64 + skew * item
    found = (
        memory[start : start + values.size * item].view(NUMPY_DTYPES[dtype]).reshape(values.shape)
    )
    found[...] = values
    return found


@dataclass(frozen=True, slots=True)
class Case:
    """Inputs of a launch, and its outputs in float64."""

    x: np.ndarray
    gates: np.ndarray
    coefficients: np.ndarray
    history: list[np.ndarray]
    x_out: np.ndarray
    stored: list[np.ndarray]
    last_entry: list[int]  # per stored prediction: the history tensor that it may overwrite

    @property
    def inputs(self) -> list[np.ndarray]:
        return [self.x, self.gates, self.coefficients, *self.history]


def random_case(
    stack: Stack, shape: tuple[int, int, int], dtype: str, seed: int, skew: int = 0
) -> Case:
    rng = np.random.default_rng(seed)

    def normal(*size: int) -> np.ndarray:
        return tensor(rng.standard_normal(size), dtype, skew=skew)

    x, gates = normal(*shape), normal(stack.units, shape[0], shape[2])
    coefficients = tensor(rng.uniform(-2, 2, sum(stack.entries)), "float32", skew=1)
    history, stored, last_entry = [], [], []
    total, first = x.astype(np.float64), 0
    for unit, (entries, stores) in enumerate(zip(stack.entries, stack.stores, strict=True)):
        own = [normal(*shape) for _ in range(entries)]
        history += own
        c = coefficients[first : first + entries].astype(np.float64)
        g = own[0] + sum(c[i] * own[i].astype(np.float64) for i in range(1, entries))
        total = total + c[0] * gates[unit].astype(np.float64)[:, None] * g
        if stores:
            stored.append(g)
            last_entry.append(len(history) - 1)
        first += entries
    return Case(x, gates, coefficients, history, total, stored, last_entry)


def assert_close(found: np.ndarray, expected: np.ndarray, dtype: str, terms: int) -> None:
    """Equal up to one rounding to the dtype and one float32 rounding per term."""
    magnitude = np.maximum(np.abs(expected), 1)
    allowed = EPSILON[dtype] * magnitude / 2 + 2.0**-21 * terms * np.maximum(magnitude, 8)
    assert np.all(np.abs(found.astype(np.float64) - expected) <= allowed)
