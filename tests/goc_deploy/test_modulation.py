from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from goc_deploy.modulation import SHIFT_AND_SCALE, ModulationRows

TWO = ModulationRows(((0, "gate"), (1, "gate")), (SHIFT_AND_SCALE,) * 2)
NAMES = st.lists(st.sampled_from(["shift", "scale", "shift_text", "scale_text"]), unique=True)


@given(st.lists(NAMES.map(tuple), min_size=1, max_size=84).map(tuple), st.data())
def test_every_row_has_one_reader(units: tuple[tuple[str, ...], ...], data: st.DataObject) -> None:
    gates = [(unit, "gate") for unit in range(len(units))]
    gates += [(unit, "gate_text") for unit in range(len(units)) if data.draw(st.booleans())]
    rows = ModulationRows(tuple(gates), units)
    read = [rows.final_shift, rows.final_scale]
    for unit, names in enumerate(units):
        of_unit = [gate for reader, gate in gates if reader == unit]
        assert list(rows.of_unit(unit)) == [*of_unit, *names]
        read += rows.of_unit(unit).values()
    assert sorted(read) == list(range(rows.count))
    assert [rows.gate(feature) for feature in range(len(gates))] == list(rows.gates)


def test_the_parts_of_a_table_stand_in_the_order_of_its_rows() -> None:
    gates = tuple((unit, "gate") for unit in range(3))
    rows = ModulationRows(gates, (SHIFT_AND_SCALE, (), ("scale",)))
    names = {rows.final_shift: "final shift", rows.final_scale: "final scale"}
    for unit in range(3):
        names |= {row: f"{name} {unit}" for name, row in rows.of_unit(unit).items()}
    parts = rows.in_order(
        gates=["gate 0", "gate 1", "gate 2"],
        final=["final shift", "final scale"],
        units=["shift 0", "scale 0", "scale 2"],
    )
    assert [name for part in parts for name in part] == [names[row] for row in range(rows.count)]


@pytest.mark.parametrize(
    ("computes", "predicts", "expected"),
    [(True, True, range(8)), (True, False, range(8)), (False, True, range(4))],
)
def test_a_step_reads_one_range_of_rows(computes: bool, predicts: bool, expected: range) -> None:
    assert TWO.read(computes=computes, predicts=predicts) == expected


def test_a_step_that_only_adds_an_accumulator_reads_the_rows_of_the_final_layer() -> None:
    assert list(TWO.read(computes=False, predicts=False)) == [TWO.final_shift, TWO.final_scale]
