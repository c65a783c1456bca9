"""A predict launch as an engine, on the host's memory."""

from __future__ import annotations

import numpy as np
import pytest

from goc_deploy.engines.host import HostDevice
from goc_deploy.engines.plugin.kernel import DTYPES, Stack
from goc_deploy.engines.plugin.predict import PredictKernel
from goc_deploy.errors import EngineDirError
from goc_deploy.host_memory import host_array
from goc_deploy.protocols import Buffer
from tests.engines.plugin.arrays import NUMPY_DTYPES, Case, assert_close, random_case
from tests.engines.plugin.conftest import HostKernels

SIGNATURE, STACK, SHAPE = (
    "1*1 3w*2 2w*1",
    Stack((1, 3, 3, 2), (False, True, True, True)),
    (2, 5, 24),
)
STREAM = HostDevice().stream()
Tensors = dict[str, Buffer]


def buffer(array: np.ndarray, dtype: str) -> Buffer:
    return Buffer(array.ctypes.data, array.shape, dtype, array)


def tensors(case: Case, dtype: str, *, in_place: bool) -> tuple[Tensors, Tensors]:
    """Inputs and outputs by the names that a plan gives them."""
    entries = [f"g{u}_{i}" for u, count in enumerate(STACK.entries) for i in range(count)]
    names = ["x", "gates", "coefficients", *entries]
    inputs = {
        name: buffer(array, "float32" if name == "coefficients" else dtype)
        for name, array in zip(names, case.inputs, strict=True)
    }
    targets = [inputs["x"], *(inputs[entries[entry]] for entry in case.last_entry)]
    if not in_place:
        targets = [HostDevice().allocate(SHAPE, dtype) for _ in targets]
    return inputs, dict(zip(["x_out", "g1", "g2", "g3"], targets, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_place", [False, True])
def test_a_launch_computes_what_numpy_does(
    host_kernels: HostKernels, dtype: str, in_place: bool
) -> None:
    engine = PredictKernel(SIGNATURE, dtype, host_kernels)
    case = random_case(STACK, SHAPE, dtype, 0)
    inputs, outputs = tensors(case, dtype, in_place=in_place)
    assert engine.dtypes == {name: b.dtype for name, b in {**inputs, **outputs}.items()}
    launch = engine.bind(inputs, outputs, STREAM)
    launch()
    for name, expected in zip(outputs, [case.x_out, *case.stored], strict=True):
        found = outputs[name]
        values = found.owner if in_place else host_array(found).view(NUMPY_DTYPES[dtype])
        assert_close(values.reshape(SHAPE), expected, dtype, 20)


def test_what_a_launch_does_not_take_is_refused(host_kernels: HostKernels) -> None:
    engine = PredictKernel(SIGNATURE, "float16", host_kernels)
    inputs, outputs = tensors(random_case(STACK, SHAPE, "float16", 0), "float16", in_place=False)
    x, coefficients = inputs["x"], inputs["coefficients"]

    def refused(reason: str, more_inputs: Tensors, more_outputs: Tensors, *without: str) -> None:
        found = [
            {name: b for name, b in {**given, **more}.items() if name not in without}
            for given, more in ((inputs, more_inputs), (outputs, more_outputs))
        ]
        with pytest.raises(EngineDirError, match=reason):
            engine.bind(*found, STREAM)

    refused(r"needs input 'g1_2'; compile the plan again", {}, {}, "g1_2")
    refused(r"does not have input 'g1_3'", {"g1_3": x}, {})
    refused(r"needs output 'x_out'", {}, {}, "x_out")
    refused(r"does not have output 'g0'", {}, {"g0": x})
    refused(
        r"coefficients as float32 \[9\] .* binds float16 \[9\]",
        {"coefficients": buffer(coefficients.owner, "float16")},
        {},
    )
    refused(
        r"coefficients as float32 \[9\] .* binds float32 \[8\]",
        {"coefficients": coefficients.view(8)},
        {},
    )
    refused(
        r"gates as float16 \[4, 2, 24\] .* binds float16 \[4, 24, 2\]",
        {"gates": inputs["gates"].view(4, 24, 2)},
        {},
    )
    refused(
        r"g0_0 as float16 \[2, 5, 24\] .* binds float16 \[10, 24\]",
        {"g0_0": inputs["g0_0"].view(10, 24)},
        {},
    )
    refused(
        r"where x is \(B, T, D\), but the plan binds float16 \[10, 24\]", {"x": x.view(10, 24)}, {}
    )
    refused(r"stores g1 on an entry that unit 2 reads", {}, {"g1": inputs["g2_1"]})


def test_a_prediction_may_lie_on_an_entry_that_earlier_units_read(
    host_kernels: HostKernels,
) -> None:
    case = random_case(STACK, SHAPE, "float32", 0)
    inputs, outputs = tensors(case, "float32", in_place=False)
    outputs["g3"] = inputs["g0_0"]
    PredictKernel(SIGNATURE, "float32", host_kernels).bind(inputs, outputs, STREAM)()
    assert_close(inputs["g0_0"].owner, case.stored[-1], "float32", 20)


def test_no_signature_is_refused(host_kernels: HostKernels) -> None:
    with pytest.raises(EngineDirError, match="'9w' is no predict signature"):
        PredictKernel("9w", "float32", host_kernels)
