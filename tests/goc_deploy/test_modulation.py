from __future__ import annotations

import pytest

from goc_deploy.modulation import ModulationRows


@pytest.mark.parametrize("units", [1, 2, 56, 84])
def test_every_row_has_one_reader(units: int) -> None:
    rows = ModulationRows(units)
    read = [rows.final_shift, rows.final_scale]
    for unit in range(units):
        read += [rows.gate(unit), rows.shift(unit), rows.scale(unit)]
    assert sorted(read) == list(range(rows.count))
    assert [rows.gate(unit) for unit in range(units)] == list(rows.gates)


def test_the_parts_of_a_table_stand_in_the_order_of_its_rows() -> None:
    rows = ModulationRows(2)
    names = {rows.final_shift: "final shift", rows.final_scale: "final scale"}
    for unit in range(2):
        names[rows.gate(unit)] = f"gate {unit}"
        names[rows.shift(unit)] = f"shift {unit}"
        names[rows.scale(unit)] = f"scale {unit}"
    parts = rows.in_order(
        gates=["gate 0", "gate 1"],
        final=["final shift", "final scale"],
        units=["shift 0", "scale 0", "shift 1", "scale 1"],
    )
    assert [name for part in parts for name in part] == [names[row] for row in range(rows.count)]


@pytest.mark.parametrize(
    ("computes", "predicts", "expected"),
    [(True, True, range(8)), (True, False, range(8)), (False, True, range(4))],
)
def test_a_step_reads_one_range_of_rows(computes: bool, predicts: bool, expected: range) -> None:
    assert ModulationRows(2).read(computes=computes, predicts=predicts) == expected


def test_a_step_that_only_adds_an_accumulator_reads_the_rows_of_the_final_layer() -> None:
    rows = ModulationRows(2)
    read = rows.read(computes=False, predicts=False)
    assert list(read) == [rows.final_shift, rows.final_scale]
