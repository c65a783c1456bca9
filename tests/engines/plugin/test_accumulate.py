"""An accumulate launch as an engine, on the host's memory, and its parameters."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from goc_deploy.compiler.cache_ops import accumulate_signature
from goc_deploy.compiler.plan import MAX_TAPS
from goc_deploy.engines.host import HostDevice
from goc_deploy.engines.plugin.accumulate import (
    AccumulateKernel,
    TapsParameters,
    accumulate_geometry,
    kernel_from_signature,
)
from goc_deploy.engines.plugin.kernel import DTYPES
from goc_deploy.engines.plugin.predict import PredictKernel
from goc_deploy.errors import EngineDirError
from goc_deploy.precision import DTYPE_BYTES
from goc_deploy.protocols import Buffer
from tests.engines.plugin.arrays import assert_close, tensor
from tests.engines.plugin.conftest import HostKernels

STREAM = HostDevice().stream()
Arrays = dict[str, np.ndarray]


def buffers(arrays: Arrays, dtype: str) -> dict[str, Buffer]:
    return {
        name: Buffer(
            array.ctypes.data, array.shape, "float32" if name == "coefficients" else dtype, array
        )
        for name, array in arrays.items()
    }


def random_tensors(
    starts: list[bool], shape: tuple[int, int, int], dtype: str, seed: int, skew: int = 0
) -> tuple[Arrays, Arrays]:
    """Inputs, and outputs that lie on the accumulators that go on."""
    rng = np.random.default_rng(seed)

    def normal(*size: int) -> np.ndarray:
        return tensor(rng.standard_normal(size), dtype, skew=skew)

    inputs = {
        "g": normal(*shape),
        "coefficients": tensor(rng.uniform(-2, 2, len(starts)), "float32"),
    }
    inputs |= {f"gate{tap}": normal(shape[0], shape[2]) for tap in range(len(starts))}
    inputs |= {f"a{tap}": normal(*shape) for tap, start in enumerate(starts) if not start}
    nothing = np.full(shape, np.nan)
    outputs = {
        f"a{tap}_out": tensor(nothing, dtype, skew=skew) if start else inputs[f"a{tap}"]
        for tap, start in enumerate(starts)
    }
    return inputs, outputs


def expected(inputs: Arrays, starts: list[bool]) -> list[np.ndarray]:
    wide = {name: array.astype(np.float64) for name, array in inputs.items()}
    return [
        (0 if start else wide[f"a{tap}"])
        + wide["coefficients"][tap] * wide[f"gate{tap}"][:, None] * wide["g"]
        for tap, start in enumerate(starts)
    ]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.booleans(), min_size=1, max_size=MAX_TAPS).map(sorted),
    st.tuples(st.integers(1, 3), st.integers(1, 9), st.sampled_from([1, 3, 8, 12, 16, 40])),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.sampled_from([0, 0, 1]),
    st.integers(0, 2**32 - 1),
)
def test_a_launch_adds_what_numpy_adds(
    host_kernels: HostKernels,
    starts: list[bool],
    shape: tuple[int, int, int],
    dtype: str,
    backwards: bool,
    skew: int,
    seed: int,
) -> None:
    inputs, outputs = random_tensors(starts, shape, dtype, seed, skew)
    wanted = expected(inputs, starts)
    engine = AccumulateKernel(accumulate_signature(starts), dtype, host_kernels)
    bound, targets = buffers(inputs, dtype), buffers(outputs, dtype)
    assert engine.dtypes == {name: b.dtype for name, b in {**bound, **targets}.items()}
    host_kernels.library.run_backwards(backwards)
    engine.bind(bound, targets, STREAM)()
    host_kernels.library.run_backwards(False)
    for found, values in zip(outputs.values(), wanted, strict=True):
        assert_close(found, values, dtype, 3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("hidden", "access"), [(48, "vector"), (47, "single")])
def test_every_tensor_moves_once(
    host_kernels: HostKernels, host_library: Any, dtype: str, hidden: int, access: str
) -> None:
    starts, shape = [False, False, True], (2, 5, hidden)
    inputs, outputs = random_tensors(starts, shape, dtype, 0)
    addresses = [array.ctypes.data for array in (*inputs.values(), *outputs.values())]
    assert accumulate_geometry(shape, dtype, addresses).kernel == f"goc_accumulate_{dtype}_{access}"
    engine = AccumulateKernel("a*2 s*1", dtype, host_kernels)
    run = engine.bind(buffers(inputs, dtype), buffers(outputs, dtype), STREAM)
    host_library.bytes_moved()
    run()
    feature, gates = 2 * 5 * hidden, 3 * 2 * 5 * hidden  # a thread reads the gates of its token
    assert host_library.bytes_moved() == (feature * (1 + 2 + 3) + gates) * DTYPE_BYTES[dtype]


def test_the_parameters_have_the_size_of_the_source(host_library: Any) -> None:
    assert host_library.taps_size() == ctypes.sizeof(TapsParameters)


def test_what_a_launch_does_not_take_is_refused(host_kernels: HostKernels) -> None:
    engine = AccumulateKernel("a*1 s*1", "float16", host_kernels)
    arrays, targets = random_tensors([False, True], (2, 5, 24), "float16", 0)
    inputs, outputs = buffers(arrays, "float16"), buffers(targets, "float16")

    def refused(reason: str, *without: str, **more: Buffer) -> None:
        given = {**inputs, **more}
        with pytest.raises(EngineDirError, match=reason):
            engine.bind({n: b for n, b in given.items() if n not in without}, outputs, STREAM)

    refused(r"needs input 'a0'; compile the plan again", "a0")
    refused(r"does not have input 'a1'", a1=inputs["g"])
    refused(
        r"coefficients as float32 \[2\] .* float32 \[1\]",
        coefficients=inputs["coefficients"].view(1),
    )
    refused(r"gate1 as float16 \[2, 24\] .* float16 \[48\]", gate1=inputs["gate1"].view(48))
    refused(r"a0 as float16 \[2, 5, 24\] .* float16 \[10, 24\]", a0=inputs["a0"].view(10, 24))
    with pytest.raises(EngineDirError, match="needs output 'a1_out'"):
        engine.bind(inputs, {"a0_out": outputs["a0_out"]}, STREAM)


def test_a_signature_selects_the_kernel(host_kernels: HostKernels) -> None:
    assert isinstance(kernel_from_signature("2w*3", "float32", host_kernels), PredictKernel)
    assert isinstance(kernel_from_signature("a*2", "float32", host_kernels), AccumulateKernel)
    for wrong in ("2w*3", f"a*{MAX_TAPS} s*1"):
        with pytest.raises(EngineDirError, match="is not an accumulate signature of 1 to 4 taps"):
            AccumulateKernel(wrong, "float32", host_kernels)
