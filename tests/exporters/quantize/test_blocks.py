from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from goc_deploy.errors import ModelError
from goc_deploy.exporters.quantize.blocks import (
    BLOCK,
    dequantized_blocks,
    float32_scales,
    packed,
    quantized_blocks,
)

DTYPES = st.sampled_from(["int8", "int4"])
SCALES = st.sampled_from(["float32", "float16", "bfloat16"])


@given(DTYPES, SCALES, st.integers(0, 2**32), st.floats(-30, 3), st.booleans())
def test_no_value_is_off_by_more_than_half_a_step(
    dtype: str, scale_dtype: str, seed: int, exponent: float, heavy: bool
) -> None:
    rng = np.random.default_rng(seed)
    values = rng.standard_t(2, (3 * BLOCK, 4)) if heavy else rng.uniform(-1, 1, (3 * BLOCK, 4))
    matrix = (values * 2.0**exponent).astype(np.float32)
    integers, stored = quantized_blocks(matrix, dtype, scale_dtype)
    half = 8 if dtype == "int4" else 128
    assert integers.min() >= -half
    assert integers.max() < half
    scales = np.repeat(float32_scales(stored), BLOCK, axis=0).astype(np.float64)
    steps = np.abs(integers * scales - matrix) / scales
    assert steps.max() <= 0.5 + 2e-5  # quotients of up to 127.5 were rounded to float32
    np.testing.assert_allclose(dequantized_blocks(integers, stored), integers * scales, 1e-6)


@given(DTYPES, SCALES)
def test_a_block_of_zeros_has_a_scale_that_can_be_divided_by(dtype: str, scale_dtype: str) -> None:
    integers, stored = quantized_blocks(np.zeros((BLOCK, 2), np.float32), dtype, scale_dtype)
    assert not integers.any()
    assert (float32_scales(stored) == 1).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    matrix = np.ones((BLOCK, 2), np.float32)
    matrix[3, 1] = value
    with pytest.raises(ModelError, match="infinite or not a number"):
        quantized_blocks(matrix, "int8", "float32")


def test_integers_of_4_bits_share_a_byte_low_half_first() -> None:
    assert packed(np.array([[1, -2], [-8, 7]], np.int8), "int4").tolist() == [0xE1, 0x78]
    assert packed(np.array([[1, -2]], np.int8), "int8").tolist() == [1, 254]
