from __future__ import annotations

from pathlib import Path

import pytest

from goc_deploy.errors import ScheduleError, UsageError
from goc_deploy.policies import check_plan_name, parse_policy, schedule_from_policy
from goc_deploy.schedule import COMPUTE, REUSE, Schedule, gradient
from goc_deploy.spec import ModelSpec

SPEC = ModelSpec(2, 8, 2, 16, 2, 2, 4, 10, False)


def made(text: str, steps: int = 20) -> Schedule:
    return schedule_from_policy(parse_policy(text), SPEC, steps)


def steps_with(schedule: Schedule, row: tuple[float, ...]) -> list[int]:
    """Steps at which every unit does ``row``."""
    return [k for k, rows in enumerate(schedule.coefficients) if set(rows) == {row}]


def test_fora_reuses_odd_steps() -> None:
    assert steps_with(made("fora:2"), REUSE) == [1, 3, 5, 7, 9, 11, 13, 15, 17, 19]
    assert steps_with(made("fora:2@0.5"), REUSE) == [1, 3, 5, 7, 9]


def test_the_fraction_ends_before_the_step_it_reaches() -> None:
    assert steps_with(made("fora:2@0.15"), REUSE) == [1]
    assert steps_with(made("fora:2@0.55"), REUSE) == [1, 3, 5, 7, 9]
    assert steps_with(made("fora:2@0.56"), REUSE) == [1, 3, 5, 7, 9, 11]


def test_an_interval_of_three_computes_every_third_step() -> None:
    assert steps_with(made("fora:3", steps=10), COMPUTE) == [0, 3, 6, 9]


def test_gc_uses_the_gradient_wherever_history_allows() -> None:
    schedule = made("fora:2+gc:1.2")
    assert steps_with(schedule, REUSE) == [1]
    assert steps_with(schedule, gradient(1.2)) == [3, 5, 7, 9, 11, 13, 15, 17, 19]


def test_the_default_eta_is_one() -> None:
    assert made("fora:2+gc").coefficients == made("fora:2+gc:1.0").coefficients


def test_explicit_steps_get_the_gradient_and_the_others_plain_reuse() -> None:
    schedule = made("fora:2+steps:3,5,7,9,11,13,15,19:1.2")
    assert steps_with(schedule, REUSE) == [1, 17]


def test_with_computed_history_a_second_prediction_in_a_row_still_reads_computed_features() -> None:
    schedule = made("fora:3+gc:1.0,history=computed", steps=9)
    assert schedule.history == "computed"
    assert steps_with(schedule, REUSE) == [1, 2]
    assert steps_with(schedule, gradient(1.0)) == [4, 5, 7, 8]


def test_a_schedule_file_is_a_policy_and_takes_corrections(tmp_path: Path) -> None:
    path = tmp_path / "my+file.json"
    made("fora:2").save(path)
    assert made(f"file:{path}").coefficients == made("fora:2").coefficients
    assert made(f"file:{path}+gc:1.2").coefficients == made("fora:2+gc:1.2").coefficients


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("fora:2+gc:1.2", "fora-2+gc-1.2"),
        ("none", "none"),
        ("file:/a/b/mine.json", "file-mine"),
        ("fora:2+gc,history=computed", "fora-2+gc,history=computed"),
    ],
)
def test_the_default_name_is_the_spec_made_file_safe(text: str, name: str) -> None:
    assert parse_policy(text).default_name == name
    assert check_plan_name(name) == name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "unknown policy ''"),
        ("fora", "interval '' must be"),
        ("fora:0", "interval '0' must be"),
        ("fora:2.5", "interval '2.5' must be"),
        ("fora:2@0", "fraction 0 must be"),
        ("fora:2@x", "fraction 'x' is not a number"),
        ("fora:2@nan", "fraction nan is out of range"),
        ("fora:2+gc:x", "eta 'x' is not a number"),
        ("fora:2+gc:inf", "eta inf is out of range"),
        ("fora:2+steps:3,x:1", "steps '3,x' must be"),
        ("fora:2+steps:20:1", "step 20 is beyond the last step 19"),
        ("fora:2+gc+gc", "more than one"),
        ("fora:2+other", "unknown correction 'other'"),
        ("none:1", "'none' takes no argument"),
        ("fora:2,history=old", "unknown option 'history=old'"),
        ("file:", "'file:' needs a path"),
    ],
)
def test_bad_specs_are_refused_with_the_part_that_is_wrong(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        made(text)


def test_a_schedule_file_with_another_step_count_is_refused(tmp_path: Path) -> None:
    made("fora:2", steps=10).save(tmp_path / "s.json")
    with pytest.raises(ScheduleError, match="10 steps but 20 are asked for"):
        made(f"file:{tmp_path / 's.json'}")
    with pytest.raises(ScheduleError, match="cannot be read: No such file"):
        made("file:/nowhere/s.json")


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "..", "a b", "x" * 101, "ä"])
def test_plan_names_that_are_no_file_names_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="plan name"):
        check_plan_name(name)
