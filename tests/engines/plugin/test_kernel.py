"""The kernel's source, compiled for the host, against NumPy; and compiled for GPUs."""

from __future__ import annotations

import ctypes
import math
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from goc_deploy.compiler import Predict, Prediction
from goc_deploy.compiler.plan import MAX_LAUNCH_UNITS
from goc_deploy.engines.plugin import kernel, nvrtc
from goc_deploy.engines.plugin.kernel import (
    BUSY_BLOCKS,
    DTYPES,
    KERNELS,
    MAX_ENTRIES,
    MAX_UNITS,
    SOURCE_PATH,
    THREADS,
    Stack,
    StackParameters,
    geometry,
    parameters_from_addresses,
    stack_from_signature,
)
from goc_deploy.engines.plugin.moves import MovesParameters
from goc_deploy.errors import EngineDirError, EnvironmentUnsupportedError
from goc_deploy.precision import DTYPE_BYTES
from goc_deploy.schedule import MAX_HISTORY
from tests.engines.plugin.arrays import NUMPY_DTYPES, Case, assert_close, random_case, tensor
from tests.engines.plugin.conftest import HostKernels
from tests.stand_ins.kernels import require_nvrtc

TARGETS = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")

stacks = st.lists(st.tuples(st.integers(1, 4), st.booleans()), min_size=1, max_size=6).map(
    lambda units: Stack(tuple(k for k, _ in units), tuple(w for _, w in units))
)
shapes = st.tuples(st.integers(1, 3), st.integers(1, 9), st.sampled_from([1, 3, 8, 12, 16, 40]))


def launch(
    kernels: HostKernels,
    stack: Stack,
    case: Case,
    dtype: str,
    *,
    in_place: bool,
    busy_blocks: int = 0,
) -> tuple[str, np.ndarray, list[np.ndarray]]:
    """The kernel that ran, x_out, and what was stored."""
    shape = case.x.shape
    own = [case.x, *(case.history[entry] for entry in case.last_entry)]
    x_out, *stored = own if in_place else [tensor(np.full(shape, np.nan), dtype) for _ in own]
    inputs = [array.ctypes.data for array in case.inputs]
    outputs = [array.ctypes.data for array in (x_out, *stored)]
    chosen = geometry(shape, dtype, inputs, outputs, busy_blocks=busy_blocks)
    kernels.launch(chosen, parameters_from_addresses(stack, shape, inputs, outputs), 0)
    return chosen.kernel, x_out, stored


def expected_name(shape: tuple[int, int, int], dtype: str, skew: int) -> str:
    """The kernel for a shape where any number of blocks is enough."""
    if shape[2] % (16 // DTYPE_BYTES[dtype]) or skew:
        return f"goc_stack_{dtype}_single"
    return f"goc_stack_{dtype}_{math.gcd(2, shape[1])}"


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    stacks,
    shapes,
    st.sampled_from(DTYPES),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0, 0, 1]),
    st.integers(0, 2**32 - 1),
)
def test_a_launch_is_the_sum_over_units_that_numpy_makes(
    host_kernels: HostKernels,
    stack: Stack,
    shape: tuple[int, int, int],
    dtype: str,
    in_place: bool,
    backwards: bool,
    skew: int,
    seed: int,
) -> None:
    case = random_case(stack, shape, dtype, seed, skew)
    host_kernels.library.run_backwards(backwards)
    name, x_out, stored = launch(host_kernels, stack, case, dtype, in_place=in_place)
    host_kernels.library.run_backwards(False)
    assert name == expected_name(shape, dtype, skew)
    terms = 1 + sum(stack.entries)
    assert_close(x_out, case.x_out, dtype, terms)
    for found, expected in zip(stored, case.stored, strict=True):
        assert_close(found, expected, dtype, terms)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_launch_of_the_most_units_fits_and_is_right(
    host_kernels: HostKernels, dtype: str
) -> None:
    stack = Stack((4,) * MAX_UNITS, (True,) * MAX_UNITS)
    case = random_case(stack, (2, 5, 16), dtype, 0)
    _, x_out, stored = launch(host_kernels, stack, case, dtype, in_place=True)
    assert_close(x_out, case.x_out, dtype, 1000)
    for found, expected in zip(stored, case.stored, strict=True):
        assert_close(found, expected, dtype, 1000)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("entries", [1, 2, 4])
@pytest.mark.parametrize("stores", [False, True])
@pytest.mark.parametrize(
    ("tokens", "hidden", "per_thread"), [(16, 48, 2), (17, 48, 1), (16, 47, 1)]
)
def test_every_tensor_moves_once_and_a_gate_once_per_thread(
    host_kernels: HostKernels,
    host_library: Any,
    dtype: str,
    entries: int,
    stores: bool,
    tokens: int,
    hidden: int,
    per_thread: int,
) -> None:
    stack, shape = Stack((entries,) * 3, (stores,) * 3), (2, tokens, hidden)
    host_library.bytes_moved()
    launch(host_kernels, stack, random_case(stack, shape, dtype, 0), dtype, in_place=False)
    gates = stack.units * shape[0] * shape[2] * DTYPE_BYTES[dtype]
    coefficients = 4 * sum(stack.entries)
    needed = stack.bytes_needed(shape, dtype)
    assert host_library.bytes_moved() == needed - coefficients + gates * (tokens // per_thread - 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_prediction_may_lie_on_an_entry_of_an_earlier_unit(
    host_kernels: HostKernels, dtype: str
) -> None:
    """The next unit is fetched before this one is stored.

    Nothing of the units before is read any more.
    """
    stack = Stack((4, 2, 3, 1), (False, False, True, True))
    case = random_case(stack, (2, 4, 16), dtype, 0)
    moved = replace(case, last_entry=[4, 3])  # on g1_0 and g0_3
    _, x_out, stored = launch(host_kernels, stack, moved, dtype, in_place=True)
    for found, expected in zip([x_out, *stored], [case.x_out, *case.stored], strict=True):
        assert_close(found, expected, dtype, 20)


@pytest.mark.parametrize(
    ("rows", "tokens", "per_thread"),
    [(1, 256, 1), (2, 256, 1), (4, 256, 2), (64, 256, 2), (8, 255, 1)],
)
def test_a_thread_serves_more_tokens_where_enough_blocks_are_left(
    rows: int, tokens: int, per_thread: int
) -> None:
    chosen = geometry((rows, tokens, 1152), "float16", [256] * 4, [256] * 2)
    assert chosen.kernel == f"goc_stack_float16_{per_thread}"
    assert chosen.threads * per_thread * 8 == rows * tokens * 1152
    assert per_thread == 1 or chosen.blocks >= BUSY_BLOCKS


@given(stacks)
def test_a_stack_is_what_the_signature_of_its_plan_says(stack: Stack) -> None:
    predictions = tuple(
        Prediction(tuple(range(entries)), (1.0,) * entries, 0 if stores else None)
        for entries, stores in zip(stack.entries, stack.stores, strict=True)
    )
    assert stack_from_signature(Predict(0, predictions).signature) == stack


@pytest.mark.parametrize("signature", ["1*89", "1w*44 2*45"])
def test_more_units_than_a_launch_serves_are_refused(signature: str) -> None:
    with pytest.raises(EngineDirError, match="of 89 units; a launch serves at most 88"):
        stack_from_signature(signature)


def test_the_source_has_the_limits_of_schedules_and_plans() -> None:
    limits = dict(re.findall(r"const int (GOC_MAX_\w+) = (\d+);", SOURCE_PATH.read_text()))
    assert limits == {"GOC_MAX_UNITS": str(MAX_LAUNCH_UNITS), "GOC_MAX_ENTRIES": str(MAX_HISTORY)}
    assert (MAX_UNITS, MAX_ENTRIES) == (MAX_LAUNCH_UNITS, MAX_HISTORY)


def test_python_and_the_source_agree_on_the_parameters(host_library: Any) -> None:
    assert ctypes.sizeof(StackParameters) == host_library.stack_size() <= 4096
    assert ctypes.sizeof(MovesParameters) == host_library.moves_size()
    assert host_library.threads_per_block() == THREADS


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_host_converts_as_numpy_does(host_library: Any, dtype: str) -> None:
    def convert(name: str, values: np.ndarray, to: np.dtype) -> np.ndarray:
        found = np.empty(values.shape, to)
        getattr(host_library, f"{name}_{dtype}")(
            ctypes.c_void_p(values.ctypes.data),
            ctypes.c_void_p(found.ctypes.data),
            ctypes.c_int64(values.size),
        )
        return found

    every = np.arange(2**16, dtype=np.uint16)
    wide = convert("widen", every, np.dtype(np.float32))
    np.testing.assert_array_equal(wide, every.view(NUMPY_DTYPES[dtype]).astype(np.float32))
    finite = wide[np.isfinite(wide)]
    with np.errstate(over="ignore"):
        halfway = (finite[:-1] + finite[1:]) / 2
        near = np.concatenate(
            [np.nextafter(halfway, np.float32(sign)) for sign in (-np.inf, np.inf)]
        )
    rng = np.random.default_rng(0)
    anything = rng.integers(0, 2**32, 10**5, np.uint32).view(np.float32)
    values = np.concatenate([wide, halfway, near, anything]).astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = values.astype(NUMPY_DTYPES[dtype])
    found = convert("narrow", values, np.dtype(np.uint16)).view(NUMPY_DTYPES[dtype])
    np.testing.assert_array_equal(found.astype(np.float32), expected.astype(np.float32))


def test_nvrtc_compiles_for_every_target_without_a_gpu() -> None:
    require_nvrtc()
    with ThreadPoolExecutor(2) as pool:
        for cubin in pool.map(kernel.cubin_for, TARGETS):
            assert cubin.startswith(b"\x7fELF")
            assert all(name.encode() in cubin for name in KERNELS)


def test_a_process_without_torch_compiles_too() -> None:
    """NVRTC 13.0 does not find the library that it compiles with.

    If torch is imported, it has loaded that library.
    """
    require_nvrtc()
    program = (
        "from goc_deploy.engines.plugin.kernel import cubin_for; "
        "import sys; assert 'torch' not in sys.modules; cubin_for('9.0')"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_nvrtc_says_what_it_refuses() -> None:
    require_nvrtc()
    with pytest.raises(
        EnvironmentUnsupportedError,
        match=r"cannot compile bad.cu for compute capability 8.6: bad.cu\(1\)",
    ):
        nvrtc.cubin_from_source("int x = y;", "bad.cu", "8.6")
    with pytest.raises(EnvironmentUnsupportedError, match=r"capability 3.0: .*gpu-architecture"):
        nvrtc.cubin_from_source(SOURCE_PATH.read_text(), "update.cu", "3.0")
