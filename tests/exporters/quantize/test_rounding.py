"""Values that the dtypes of quantised products can hold."""

from __future__ import annotations

import numpy as np
import pytest

from goc_deploy.errors import ModelError
from goc_deploy.exporters.quantize.rounding import encoded, rounded
from goc_deploy.exporters.quantize.static import StaticInput


def test_int8_rounds_to_even_and_saturates() -> None:
    values = np.array([0.5, 1.5, -200, 200], np.float32)
    found = rounded(values, "int8")
    np.testing.assert_array_equal(found, [0, 2, -128, 127])
    np.testing.assert_array_equal(encoded(found, "int8").view(np.uint8), [0, 2, 128, 127])


def test_float8_has_three_bits_of_mantissa_and_saturates() -> None:
    values = np.array([1, 1.06, 17, 1000, -1000, 2.0**-10], np.float32)
    found = rounded(values, "float8_e4m3fn")
    np.testing.assert_array_equal(found, [1, 1, 16, 448, -448, 0])
    np.testing.assert_array_equal(
        encoded(found, "float8_e4m3fn"), [0x38, 0x38, 0x58, 0x7E, 0xFE, 0]
    )


@pytest.mark.parametrize("values", ["int8", "float8_e4m3fn"])
def test_columns_have_scales_of_their_own(values: str) -> None:
    rng = np.random.default_rng(0)
    matrix = (rng.standard_normal((64, 6)) * 10.0 ** np.arange(6)).astype(np.float32)
    matrix[:, 2] = 0
    found, scales = StaticInput(1.0, None, "float32", None, 1.0, values).quantized(matrix)
    assert (scales.shape, scales[2]) == ((6,), 1)
    limit = {"int8": 0.02, "float8_e4m3fn": 0.05}[values]
    others = [0, 1, 3, 4, 5]
    error = np.linalg.norm(found * scales - matrix, axis=0)[others]
    assert (error < limit * np.linalg.norm(matrix, axis=0)[others]).all()
    matrix[3, 3] = np.inf
    with pytest.raises(ModelError, match="infinite or not a number"):
        StaticInput(1.0, None, "float32", None, 1.0, values).quantized(matrix)
