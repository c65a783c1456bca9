"""Schedules as files, which people edit."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from goc_deploy.errors import ScheduleError
from goc_deploy.schedule import Schedule
from goc_deploy.schedule.schedule import schedule_from_file, schedule_from_json, schedule_to_json
from tests.goc_deploy.strategies import schedules

C, R = (), (1.0,)
SCHEDULE = Schedule(2, ("attn", "mlp"), ((C,) * 4, (R,) * 4))


def read(text: str) -> Schedule:
    return schedule_from_json(text.encode(), "schedule s.json")


@given(schedules())
def test_saving_and_loading_a_schedule_is_the_identity(schedule: Schedule) -> None:
    text = schedule_to_json(schedule)
    assert read(text) == schedule
    assert schedule_to_json(read(text)) == text


def test_a_schedule_file_can_be_edited_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    SCHEDULE.save(path)
    path.write_text(path.read_text().replace('"R R R R"', '"R C R C"'))
    assert Schedule.load(path).coefficients[1] == (R, C, R, C)


def test_numbers_without_a_point_and_fields_of_others_are_accepted() -> None:
    found = json.loads(schedule_to_json(SCHEDULE))
    found.update(predictors={"G": [2, -1], "R": [1]}, comment="mine", actions=["C C C C"] * 3)
    found["actions"].append("G R G C")
    assert read(json.dumps(found)).coefficients[3] == ((2.0, -1.0), R, (2.0, -1.0), C)


def test_provenance_is_kept_and_schedules_of_the_first_version_are_read() -> None:
    learned = replace(SCHEDULE, provenance={"god": {"eta": 1.0, "boundary": [0.0, 0.5]}})
    assert read(schedule_to_json(learned)).provenance == learned.provenance
    assert learned == SCHEDULE
    first = schedule_to_json(SCHEDULE).replace('"version": 2', '"version": 1')
    assert read(first) == SCHEDULE


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"C C C C"', '"C C C"', ": $.actions[0]: step 0 has 3 actions for 4 units"),
        (
            '"R R R R"',
            '"R R X R"',
            ": $.actions[1]: step 1, block 1, attn: unknown action 'X'; use C or a name in "
            "$.predictors",
        ),
        ('"C C C C"', "7", ": $.actions[0]: expected str, got 7"),
        ('"depth": 2', '"depth": -1', ": $.depth: expected int >= 1, got -1"),
        ('"depth": 2', '"depth": 1001', ": $.depth: expected int <= 1000, got 1001"),
        ('"depth": 2', '"depth": "2"', ": $.depth: expected int, got '2'"),
        ('"depth": 2', '"depth": true', ": $.depth: expected int, got True"),
        (
            '"branches": [',
            '"branches": ["a", "b", "c", "d", "e", ',
            ": $.branches: expected array of length <= 6, got 7",
        ),
        ('"used"', '"usd"', ": $.history: expected used or computed, got 'usd'"),
        (
            '"short_history": "error"',
            '"short_history": "none"',
            ": $.short_history: expected reuse or error, got 'none'",
        ),
        ('"policy": ""', '"policy": 3', ": $.policy: expected str, got 3"),
        ('"predictors"', '"predictorz"', ": $.predictors: required field is missing"),
        ('"R": [', '"C": [', ": $.predictors.C: a predictor cannot be named C, which computes"),
        ("   1.0\n", "", ": $.predictors.R: expected array of length >= 1, got 0"),
        ("   1.0\n", '1.5, "a"', ": $.predictors.R[1]: expected float, got 'a'"),
        ("   1.0\n", "null", ": $.predictors.R[0]: expected float, got None"),
        ("   1.0\n", "true", ": $.predictors.R[0]: expected float, got True"),
        ('"depth"', '"provenance": [], "depth"', ": $.provenance: expected object, got []"),
        ('"depth": 2', '"depth": 2, "depth": 2', " is not valid JSON: duplicate key 'depth'"),
        ('"depth": 2', '"depth": NaN', " is not valid JSON: NaN is not allowed"),
        ("{", "[" * 100_000, " is not valid JSON: it is nested too deep"),
        ('"version": 2', '"version": 3', " has format version 3, this goc_deploy reads up to 2"),
        ('"version": 2', '"version": 0', " has format version 0, this goc_deploy reads 2; export"),
        ('"goc_deploy.schedule"', '"other"', " is not a goc_deploy.schedule file"),
    ],
)
def test_malformed_schedule_files_are_refused_with_the_place(
    old: str, new: str, message: str
) -> None:
    text = schedule_to_json(SCHEDULE)
    assert old in text
    with pytest.raises(ScheduleError) as caught:
        read(text.replace(old, new, 1))
    assert str(caught.value).startswith(f"schedule s.json{message}")


@pytest.mark.parametrize(("row", "found"), [('"1"', "'1'"), ("1", "1"), ("{}", "{}")])
def test_a_predictor_that_is_no_list_is_refused(row: str, found: str) -> None:
    fields: dict[str, Any] = json.loads(schedule_to_json(SCHEDULE))
    fields["predictors"]["R"] = json.loads(row)
    with pytest.raises(ScheduleError) as caught:
        read(json.dumps(fields))
    assert str(caught.value) == f"schedule s.json: $.predictors.R: expected array, got {found}"


@given(st.binary(max_size=200))
def test_no_bytes_crash_the_reader(junk: bytes) -> None:
    with pytest.raises(ScheduleError):
        schedule_from_json(junk, "junk")


def test_devices_pipes_and_odd_names_are_no_schedules(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (Path("/dev/zero"), tmp_path / "pipe", tmp_path, Path("a\0b"), Path("x" * 5000)):
        with pytest.raises(ScheduleError, match="cannot be read"):
            schedule_from_file(path)
