"""Every kernel on a GPU, launched and recorded.

The process needs neither torch nor TensorRT.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from goc_deploy.compiler.cache_ops import accumulate_signature
from goc_deploy.engines.plugin.accumulate import AccumulateKernel
from goc_deploy.engines.plugin.kernel import (
    BUSY_BLOCKS,
    DTYPES,
    MAX_UNITS,
    DeviceKernels,
    Stack,
    device_kernels,
    geometry,
    parameters_from_addresses,
)
from goc_deploy.engines.plugin.moves import (
    NEXT_STEP,
    ByteMove,
    CounterParameters,
    moves_geometry,
    moves_parameters,
)
from goc_deploy.protocols import Buffer
from tests.engines.plugin.arrays import assert_close, random_case
from tests.engines.plugin.cuda_memory import CudaMemory
from tests.engines.plugin.test_accumulate import expected as added
from tests.engines.plugin.test_accumulate import random_tensors

pytestmark = pytest.mark.gpu
Moved = list[tuple[int, np.ndarray]]  # addresses, and what must lie there


@pytest.fixture(scope="module")
def device() -> CudaMemory:
    try:
        return CudaMemory()
    except (ImportError, RuntimeError) as reason:
        pytest.skip(f"no GPU can be used: {reason}")


@pytest.fixture
def memory(device: CudaMemory) -> Iterator[CudaMemory]:
    yield device
    device.free()


@pytest.fixture(scope="module")
def kernels(device: CudaMemory) -> DeviceKernels:  # noqa: ARG001
    return device_kernels()


def check(
    memory: CudaMemory,
    kernels: DeviceKernels,
    stack: Stack,
    shape: tuple[int, int, int],
    dtype: str,
    *,
    busy_blocks: int = BUSY_BLOCKS,
    recorded: bool = False,
) -> None:
    """A stack is what NumPy makes, each stored prediction over the entry that dies."""
    case = random_case(stack, shape, dtype, 0)
    inputs = [memory.put(array) for array in case.inputs]
    outputs = [inputs[0], *(inputs[3 + entry] for entry in case.last_entry)]
    chosen = geometry(shape, dtype, inputs, outputs, busy_blocks=busy_blocks)
    launch = partial(
        kernels.launch,
        chosen,
        parameters_from_addresses(stack, shape, inputs, outputs),
        memory.stream,
    )
    run = memory.recorded([launch]) if recorded else launch
    run()
    for address, expected in zip(outputs, [case.x_out, *case.stored], strict=True):
        assert_close(memory.get(address, case.x), expected, dtype, 10 * stack.units)
    memory.free()


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "busy_blocks"),
    [((2, 256, 1152), BUSY_BLOCKS), ((2, 64, 1152), 0), ((3, 17, 40), 0), ((1, 5, 3), 0)],
)
def test_a_stack_is_what_numpy_makes(
    memory: CudaMemory,
    kernels: DeviceKernels,
    shape: tuple[int, int, int],
    busy_blocks: int,
    dtype: str,
    recorded: bool,
) -> None:
    """An odd and an even number of units."""
    for units in (11, 12):
        stack = Stack(((1, 2, 3, 4) * 3)[:units], ((False, True, True, True) * 3)[:units])
        check(memory, kernels, stack, shape, dtype, busy_blocks=busy_blocks, recorded=recorded)


def test_the_most_units_fit_into_a_launch(memory: CudaMemory, kernels: DeviceKernels) -> None:
    check(memory, kernels, Stack((4,) * MAX_UNITS, (True,) * MAX_UNITS), (2, 16, 64), "float16")


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 256, 1152), (3, 17, 43)])
def test_accumulators_become_what_numpy_adds(
    memory: CudaMemory,
    kernels: DeviceKernels,
    shape: tuple[int, int, int],
    dtype: str,
    recorded: bool,
) -> None:
    """Two accumulators go on where they are, and two start."""
    starts = [False, False, True, True]
    inputs, outputs = random_tensors(starts, shape, dtype, 0)
    on_device = {
        name: Buffer(memory.put(array), array.shape, str(array.dtype), None)
        for name, array in {**outputs, **inputs}.items()
    }
    targets = {
        name: on_device[name if starts[tap] else f"a{tap}"] for tap, name in enumerate(outputs)
    }
    engine = AccumulateKernel(accumulate_signature(starts), dtype, kernels)
    stream = SimpleNamespace(handle=memory.stream)
    launch = engine.bind({name: on_device[name] for name in inputs}, targets, stream)
    (memory.recorded([launch]) if recorded else launch)()
    for buffer, values in zip(targets.values(), added(inputs, starts), strict=True):
        assert_close(memory.get(buffer.pointer, inputs["g"]), values, dtype, 3)


def gathered(memory: CudaMemory, row_bytes: int) -> tuple[ByteMove, Callable[[int], Moved]]:
    """Modulation rows of DiT-XL/2: some of a table of 4 steps and 3 labels, for a batch of 2."""
    rng = np.random.default_rng(row_bytes)
    table, rows = rng.integers(0, 256, (4, 172, 3, row_bytes), np.uint8), np.array([2, 0])
    target = np.zeros((170, 2, row_bytes), np.uint8)
    address = memory.put(target)
    source = memory.put(table) + 2 * table[0, 0].nbytes
    move = ByteMove(source, address, 4, table[0].nbytes, 170, 3, 2, row_bytes, memory.put(rows))
    return move, lambda step: [(address, table[step % 4, 2:][:, rows])]


def test_the_counter_and_the_moves_serve_every_step_of_one_graph(
    memory: CudaMemory, kernels: DeviceKernels
) -> None:
    wide, odd = gathered(memory, 2304), gathered(memory, 37)
    nbytes = 20_000_016
    values = np.random.default_rng(0).integers(0, 256, (4, nbytes), np.uint8)
    nothing = np.zeros(nbytes, np.uint8)
    source = memory.put(values)
    newest, before, oldest = (memory.put(nothing) for _ in range(3))
    flat = partial(ByteMove, outer=1, table_rows=1, batch_rows=1, row_bytes=nbytes)
    moves = [
        flat(before, oldest, period=1, step_bytes=0),
        wide[0],
        flat(newest, before, period=1, step_bytes=0),
        odd[0],
        flat(source, newest, period=4, step_bytes=nbytes),
    ]
    counter = np.array([-1, 7], np.int32)
    counter_address = memory.put(counter)
    steps = (
        (NEXT_STEP, CounterParameters(counter_address)),
        (
            moves_geometry(moves),
            moves_parameters(moves, counter_address),
        ),
    )
    launches = [partial(kernels.launch, *step, memory.stream) for step in steps]
    replay = memory.recorded(launches)
    for step in range(6):
        replay()
        for _, found in (wide, odd):
            for address, expected in found(step):
                np.testing.assert_array_equal(memory.get(address, expected), expected)
        for lag, address in enumerate((newest, before, oldest)):
            expected = values[(step - lag) % 4] if lag <= step else nothing
            np.testing.assert_array_equal(memory.get(address, nothing), expected)
    assert memory.get(counter_address, counter).tolist() == [5, 7]
