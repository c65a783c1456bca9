"""A counter of steps and moves of what depends on it, on the host, against NumPy."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from goc_deploy.engines.plugin.kernel import THREADS
from goc_deploy.engines.plugin.moves import (
    MAX_BLOCKS,
    MAX_MOVES,
    NEXT_STEP,
    ByteMove,
    CounterParameters,
    moves_geometry,
    moves_parameters,
)
from tests.engines.plugin.arrays import tensor
from tests.engines.plugin.conftest import HostKernels


@pytest.fixture(params=[False, True], ids=["forwards", "backwards"])
def kernels(request: pytest.FixtureRequest, host_kernels: HostKernels) -> Iterator[HostKernels]:
    """Kernels whose threads run in either order.

    What depends on the order of threads is a race on a GPU.
    """
    host_kernels.library.run_backwards(request.param)
    yield host_kernels
    host_kernels.library.run_backwards(False)


class Memory:
    """Bytes for moves, each array after the other, ``skew`` bytes after a multiple of 64."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.kept: list[np.ndarray] = []  # addresses stay taken

    def random(self, *shape: int, skew: int = 0) -> np.ndarray:
        found = self.zeros(*shape, skew=skew)
        found[...] = self.rng.integers(0, 256, shape)
        return found

    def zeros(self, *shape: int, skew: int = 0) -> np.ndarray:
        nbytes = int(np.prod(shape))
        memory = np.zeros(nbytes + 64 + skew, np.uint8)
        self.kept.append(memory)
        start = -memory.ctypes.data % 64 + skew
        return memory[start : start + nbytes].reshape(shape)


def address(array: np.ndarray) -> int:
    return array.ctypes.data


def run(kernels: HostKernels, moves: Sequence[ByteMove], step: int) -> None:
    counter = np.array([step], np.int32)
    kernels.launch(moves_geometry(moves), moves_parameters(moves, address(counter)), 0)
    assert counter[0] == step


def plain(source: np.ndarray, target: np.ndarray) -> ByteMove:
    return ByteMove(address(source), address(target), 1, 0, 1, 1, 1, target.nbytes)


@st.composite
def gathers(draw: st.DrawFn) -> dict[str, Any]:
    size = st.integers(1, 4)
    return {
        "shape": (draw(size), draw(size), draw(size)),  # period, outer, table rows
        "extra": draw(st.integers(0, 2)),  # rows of the table's steps that the move does not use
        "row_bytes": draw(st.sampled_from([1, 2, 3, 4, 6, 8, 20, 32, 48, 2306, 4096])),
        "batch_rows": draw(st.integers(1, 5)),
        "gathered": draw(st.booleans()),
        "skew": draw(st.sampled_from([0, 0, 0, 1, 2, 4, 16])),
    }


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(gathers(), min_size=1, max_size=MAX_MOVES),
    st.integers(0, 20),
    st.integers(0, 2**32 - 1),
)
def test_moves_are_what_numpy_picks(
    kernels: HostKernels, cases: list[dict[str, Any]], step: int, seed: int
) -> None:
    memory, moves, found, expected = Memory(seed), [], [], []
    for case in cases:
        period, outer, table_rows = case["shape"]
        batch_rows = case["batch_rows"] if case["gathered"] else table_rows
        table = memory.random(
            period, outer + case["extra"], table_rows, case["row_bytes"], skew=case["skew"]
        )
        rows = (
            memory.rng.integers(0, table_rows, batch_rows)
            if case["gathered"]
            else np.arange(table_rows)
        )
        target = memory.zeros(outer, batch_rows, case["row_bytes"], skew=case["skew"])
        memory.kept.append(rows)
        size = (period, table[0].nbytes, outer, table_rows, batch_rows, case["row_bytes"])
        moves.append(
            ByteMove(
                address(table), address(target), *size, address(rows) if case["gathered"] else None
            )
        )
        found.append(target)
        expected.append(table[step % period, :outer][:, rows])
    run(kernels, moves, step)
    for target, values in zip(found, expected, strict=True):
        np.testing.assert_array_equal(target, values)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(2, 5),
    st.sampled_from([1, 2, 12, 4096, 16 * THREADS * MAX_BLOCKS + 32]),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_plain_moves_hand_values_on(
    kernels: HostKernels, count: int, nbytes: int, newest_first: bool, seed: int
) -> None:
    memory = Memory(seed)
    arrays = [memory.random(nbytes) for _ in range(count)]
    other, aside = memory.random(7), memory.zeros(7)
    pairs = list(itertools.pairwise(arrays))  # from one to the next
    moves = [
        plain(source, target) for source, target in (pairs if newest_first else reversed(pairs))
    ]
    expected = (
        [arrays[0].copy()] * count
        if newest_first
        else [a.copy() for a in (arrays[0], *arrays[:-1])]
    )
    run(kernels, [moves[0], plain(other, aside), *moves[1:]], 3)
    for found, values in zip([*arrays, aside], [*expected, other], strict=True):
        np.testing.assert_array_equal(found, values)


def test_what_was_picked_is_handed_on(kernels: HostKernels) -> None:
    memory = Memory(0)
    table, rows = memory.random(4, 3, 32), np.array([2, 0])
    a, b, c = (memory.random(64) for _ in range(3))
    moves = [
        plain(b, c),
        plain(a, b),
        ByteMove(address(table), address(a), 4, table[0].nbytes, 1, 3, 2, 32, address(rows)),
    ]
    expected = [table[5 % 4, rows].reshape(-1), a.copy(), b.copy()]
    run(kernels, moves, 5)
    for found, values in zip((a, b, c), expected, strict=True):
        np.testing.assert_array_equal(found, values)
    run(kernels, moves[::-1], 6)
    for found in (a, b, c):
        np.testing.assert_array_equal(found, table[6 % 4, rows].reshape(-1))


def test_chains_run_in_blocks_of_their_own() -> None:
    memory = Memory(0)
    e0, e1, e2, a, b = (memory.zeros(4096) for _ in range(5))
    moves = [plain(e1, e2), plain(a, b), plain(e0, e1)]
    parameters = moves_parameters(moves, 4)
    placed = [(m.target, m.first_block, m.blocks) for m in parameters.move[: parameters.moves]]
    assert placed == [(address(b), 0, 2), (address(e2), 2, 2), (address(e1), 2, 2)]
    assert moves_geometry(moves).blocks == 4


def test_moves_that_no_order_of_threads_makes_safe_are_refused() -> None:
    memory = Memory(0)
    a, b, c = (memory.zeros(64) for _ in range(3))
    rows = np.zeros(1, np.int64)
    gathered = ByteMove(address(a), address(b), 1, 0, 1, 1, 1, 64, address(rows))
    stepwise = ByteMove(address(a), address(b), 2, 32, 1, 1, 1, 32)
    for moves, reason in [
        ([plain(c, a), gathered], "only what a plain move"),
        ([gathered, plain(c, a)], "only what a plain move"),
        ([plain(c, a), stepwise], "only what a plain move"),
        ([plain(a, b), plain(b[16:], c[:48])], "the same address"),
        ([plain(a, b), plain(b[:6], c[:6])], "same accesses"),
        ([plain(a, c), plain(b[:48], c[16:])], "the same address"),
    ]:
        with pytest.raises(AssertionError, match=reason):
            moves_parameters(moves, 4)
    with pytest.raises(AssertionError, match="must not write what it reads"):
        plain(a[:32], a[16:48])


def test_a_move_uses_the_widest_access_that_fits_and_no_more_blocks_than_accesses() -> None:
    def row(
        nbytes: int, *, rows: int | None = None, source: int = 1 << 20, step_bytes: int = 0
    ) -> ByteMove:
        return ByteMove(source, 1 << 40, 2, step_bytes, 170, 2, 2, nbytes, rows)

    assert [row(n, rows=8).access_bytes for n in (2304, 2308, 2306, 2305)] == [16, 4, 2, 1]
    assert row(2308).access_bytes == 16  # rows follow each other
    assert row(2304, source=(1 << 20) + 4).access_bytes == 4
    assert row(2304, step_bytes=2).access_bytes == 2
    assert row(2304).blocks == -(-170 * 2 * 2304 // (16 * THREADS))
    assert row(1 << 20).blocks == MAX_BLOCKS
    assert row(2304, rows=8, step_bytes=1).blocks == MAX_BLOCKS


def test_every_byte_moves_once(host_kernels: HostKernels, host_library: Any) -> None:
    memory = Memory(0)
    table, target = memory.random(2, 6, 3, 48), memory.zeros(6, 4, 48)
    rows = np.array([2, 0, 0, 1])
    host_library.bytes_moved()
    run(
        host_kernels,
        [ByteMove(address(table), address(target), 2, table[0].nbytes, 6, 3, 4, 48, address(rows))],
        1,
    )
    assert host_library.bytes_moved() == 2 * target.nbytes


def test_the_counter_counts(kernels: HostKernels) -> None:
    counter = tensor(np.array([6.0, 0.0]), "float32").view(np.int32)
    counter[:] = 6, 9
    for _ in range(3):
        kernels.launch(NEXT_STEP, CounterParameters(address(counter)), 0)
    assert counter.tolist() == [9, 9]
