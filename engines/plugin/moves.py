"""The start of a step, from Python: a counter on the device, and moves that depend on it.

A recorded graph that begins with `goc_next_step` and `goc_step_moves` serves every step of a kind.
All its other launches read memory at the same address in each step.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

from goc_deploy.engines.plugin.kernel import THREADS, Geometry

MAX_MOVES = 16
# Per chain: 2 MB in flight, which keeps the memory of an H100 busy (3.35 TB/s for 0.6 us).
MAX_BLOCKS = 1024
NEXT_STEP = Geometry("goc_next_step", 1)


class CounterParameters(ctypes.Structure):
    """``GocCounter`` of ``moves.cu``: the address of an int32."""

    _fields_ = (("step", ctypes.c_void_p),)


class MoveParameters(ctypes.Structure):
    """``GocMove`` of ``moves.cu``."""

    _fields_ = (
        ("source", ctypes.c_void_p),
        ("target", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("step_bytes", ctypes.c_int64),
        ("period", ctypes.c_int32),
        ("outer", ctypes.c_int32),
        ("table_rows", ctypes.c_int32),
        ("batch_rows", ctypes.c_int32),
        ("row_bytes", ctypes.c_int32),
        ("access_bytes", ctypes.c_int32),
        ("first_block", ctypes.c_int32),
        ("blocks", ctypes.c_int32),
    )


class MovesParameters(ctypes.Structure):
    """``GocMoves`` of ``moves.cu``."""

    _fields_ = (
        ("step", ctypes.c_void_p),
        ("moves", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("move", MoveParameters * MAX_MOVES),
    )


@dataclass(frozen=True, slots=True)
class ByteMove:
    """A `goc_deploy.protocols.Move` by addresses and bytes.

    It copies ``target[m, b] = source[step % period, m, rows[b]]``.

    Attributes:
        source: address of (period, outer, table_rows, row). The values of a step start
            ``step_bytes`` after those of the step before, so a step may use a part of a table.
        target: address of (outer, batch_rows, row), contiguous.
        period: number of steps that the source has values for.
        step_bytes: see ``source``; any number if the period is 1.
        outer: M.
        table_rows: R.
        batch_rows: B.
        row_bytes: bytes of a row.
        rows: address of B row numbers below R, int64; None copies row b to row b, with B = R.
    """

    source: int
    target: int
    period: int
    step_bytes: int
    outer: int
    table_rows: int
    batch_rows: int
    row_bytes: int
    rows: int | None = None

    def __post_init__(self) -> None:
        assert min(self.period, self.outer, self.table_rows, self.batch_rows, self.row_bytes) > 0
        assert self.rows is not None or self.table_rows == self.batch_rows
        assert self.nbytes // self.access_bytes < 2**31, "the kernel counts accesses in 31 bits"
        assert not _overlap(self.source_span, self.target_span), (
            "a move must not write what it reads"
        )

    @property
    def nbytes(self) -> int:
        """Number of bytes that are written."""
        return self.outer * self.batch_rows * self.row_bytes

    @property
    def access_bytes(self) -> int:
        """Bytes per access: the most that divides all addresses, and all rows if they have gaps."""
        steps = self.step_bytes if self.period > 1 else 0
        numbers = (
            self.source,
            self.target,
            steps,
            self.nbytes if self.rows is None else self.row_bytes,
        )
        return next(size for size in (16, 4, 2, 1) if not any(number % size for number in numbers))

    @property
    def is_plain(self) -> bool:
        """Whether every step reads the source from the first byte to the last."""
        return self.rows is None and self.period == 1

    @property
    def source_span(self) -> range:
        """Addresses that some step reads."""
        nbytes = (self.period - 1) * self.step_bytes + self.outer * self.table_rows * self.row_bytes
        return range(self.source, self.source + nbytes)

    @property
    def target_span(self) -> range:
        """Addresses that are written."""
        return range(self.target, self.target + self.nbytes)

    @property
    def blocks(self) -> int:
        """Blocks that keep the memory busy: a thread per access up to ``MAX_BLOCKS``."""
        return min(MAX_BLOCKS, -(-self.nbytes // (self.access_bytes * THREADS)))


def _overlap(a: range, b: range) -> bool:
    return a.start < b.stop and b.start < a.stop


def _chains(moves: Sequence[ByteMove]) -> list[list[ByteMove]]:
    """Group moves into chains, which run in order; different chains run at the same time."""
    assert 0 < len(moves) <= MAX_MOVES
    chains: list[list[ByteMove]] = []
    for move in moves:
        before = [chain for chain in chains if any(_chained(earlier, move) for earlier in chain)]
        chains = [chain for chain in chains if chain not in before]
        chains.append([m for chain in before for m in chain] + [move])
    return chains


def _chained(earlier: ByteMove, later: ByteMove) -> bool:
    """Whether one move writes memory that the other uses."""
    pairs = [
        (earlier.target_span, later.target_span, True),
        (earlier.target_span, later.source_span, later.is_plain),
        (earlier.source_span, later.target_span, earlier.is_plain),
    ]
    shared = [(a, b, in_order) for a, b, in_order in pairs if _overlap(a, b)]
    if shared:
        assert all(in_order for _, _, in_order in shared), (
            "only what a plain move of period 1 reads may be written"
        )
        assert all(a.start == b.start for a, b, _ in shared), (
            "moves in a chain use memory from the same address on"
        )
        assert earlier.access_bytes == later.access_bytes, "moves in a chain use the same accesses"
    return bool(shared)


def moves_geometry(moves: Sequence[ByteMove]) -> Geometry:
    """Lay out the blocks of each chain, one chain after the other."""
    return Geometry(
        "goc_step_moves", THREADS * sum(max(m.blocks for m in chain) for chain in _chains(moves))
    )


def moves_parameters(moves: Sequence[ByteMove], counter: int) -> MovesParameters:
    """Fill in the parameters of `goc_step_moves`.

    Moves are a chain if they share memory that one of them writes, such as ``e1 -> e2``, then
    ``e0 -> e1``. They run in the given order. They must use the memory from the same address on,
    with the same accesses, and read it without rows and with a period of 1. Moves that share
    nothing run at the same time.

    Args:
        moves: 1 to ``MAX_MOVES``.
        counter: address of the step's number, int32, not negative.
    """
    parameters, count, first_block = MovesParameters(counter), 0, 0
    for chain in _chains(moves):
        blocks = max(m.blocks for m in chain)
        for m in chain:
            sizes = (
                m.step_bytes,
                m.period,
                m.outer,
                m.table_rows,
                m.batch_rows,
                m.row_bytes,
                m.access_bytes,
            )
            parameters.move[count] = MoveParameters(
                m.source, m.target, m.rows, *sizes, first_block, blocks
            )
            count += 1
        first_block += blocks
    parameters.moves = count
    return parameters
