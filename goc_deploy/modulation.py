"""The modulation table: which row belongs to which unit.

The table of a step has M rows (B, D). The gates come first and the rows of the final layer next, so
that a step always reads one range of rows, whether it computes, predicts, or only adds an
accumulator.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ModulationRows:
    """The rows of a model's modulation table. Nothing else knows their order.

    A unit reads one gate, one shift and one scale. If a unit has no layer for one of them, the
    architecture fills its row with zeros or ones.

    Attributes:
        units: number of units U.
    """

    units: int

    @property
    def count(self) -> int:
        """Number of rows M."""
        return 3 * self.units + 2

    @property
    def gates(self) -> range:
        """The gates of all units, in order: what predictions read."""
        return range(self.units)

    @property
    def final_shift(self) -> int:
        """Shift of the final layer."""
        return self.gates.stop

    @property
    def final_scale(self) -> int:
        """Scale of the final layer."""
        return self.final_shift + 1

    def gate(self, unit: int) -> int:
        """Gate of a unit."""
        return self.gates[unit]

    def shift(self, unit: int) -> int:
        """Shift of a unit."""
        return self.final_scale + 1 + 2 * unit

    def scale(self, unit: int) -> int:
        """Scale of a unit."""
        return self.shift(unit) + 1

    def read(self, *, computes: bool, predicts: bool) -> range:
        """Return the rows that a step reads; the final layer always reads its own.

        Args:
            computes: the step computes a unit, which reads its gate, shift and scale.
            predicts: the step predicts a unit in place, which reads its gate.
        """
        first = self.gates.start if computes or predicts else self.final_shift
        return range(first, self.count if computes else self.final_scale + 1)

    def in_order(self, *, gates: T, final: T, units: T) -> tuple[T, T, T]:
        """Put the three parts of a table into the order of its rows.

        Args:
            gates: the gates of every unit.
            final: shift and scale of the final layer.
            units: shift and scale of every unit, unit by unit.
        """
        return gates, final, units
