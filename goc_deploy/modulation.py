"""The modulation table: which row belongs to which unit.

The table of a step has M rows (B, D). The gates come first and the rows of the final layer next, so
that a step always reads one range of rows, whether it computes, predicts, or only adds an
accumulator.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
TABLE_BUDGET_BYTES = 512 * 2**20  # of a table; that of more steps is computed in several parts
SHIFT_AND_SCALE = ("shift", "scale")


@dataclass(frozen=True, slots=True)
class ModulationRows:
    """The rows of a model's modulation table. Nothing else knows their order.

    Every feature has a gate, because predictions are gated. If a feature has no layer for it, the
    architecture fills the row with ones.

    Attributes:
        gates_of: for each feature, its unit and the name of its gate.
        units: for each unit, the names of the rows that it reads in addition to its gates.
    """

    gates_of: tuple[tuple[int, str], ...]
    units: tuple[tuple[str, ...], ...]

    @property
    def count(self) -> int:
        """Number of rows M."""
        return self.final_scale + 1 + sum(map(len, self.units))

    @property
    def gates(self) -> range:
        """The gates of all features, in order: what predictions read."""
        return range(len(self.gates_of))

    @property
    def final_shift(self) -> int:
        """Shift of the final layer."""
        return self.gates.stop

    @property
    def final_scale(self) -> int:
        """Scale of the final layer."""
        return self.final_shift + 1

    def gate(self, feature: int) -> int:
        """Gate of a feature."""
        return self.gates[feature]

    def of_unit(self, unit: int) -> dict[str, int]:
        """The rows that a unit reads, by the names of its inputs."""
        first = self.final_scale + 1 + sum(map(len, self.units[:unit]))
        gates = {
            name: self.gate(feature)
            for feature, (of_unit, name) in enumerate(self.gates_of)
            if of_unit == unit
        }
        return {**gates, **{name: first + i for i, name in enumerate(self.units[unit])}}

    def read(self, *, computes: bool, predicts: bool) -> range:
        """Return the rows that a step reads; the final layer always reads its own.

        Args:
            computes: the step computes a unit, which reads its gates and its other rows.
            predicts: the step predicts a feature in place, which reads its gate.
        """
        first = self.gates.start if computes or predicts else self.final_shift
        return range(first, self.count if computes else self.final_scale + 1)

    def in_order(self, *, gates: T, final: T, units: T) -> tuple[T, T, T]:
        """Put the three parts of a table into the order of its rows.

        Args:
            gates: the gates of every feature.
            final: shift and scale of the final layer.
            units: the other rows of every unit, unit by unit.
        """
        return gates, final, units
