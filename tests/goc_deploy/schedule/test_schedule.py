from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from goc_deploy.compiler import compile_schedule
from goc_deploy.compiler.plan_file import plan_from_json, plan_to_json
from goc_deploy.errors import ScheduleError
from goc_deploy.schedule import (
    Schedule,
    check_amplification,
    check_schedule,
    fill_short_history,
    gradient,
)
from goc_deploy.schedule.schedule import schedule_from_json, schedule_to_json
from goc_deploy.spec import ModelSpec
from tests.goc_deploy.strategies import schedules

SPEC = ModelSpec(2, 8, 2, 16, 2, 2, 4, 10, False)
C, R, G = (), (1.0,), (2.0, -1.0)


def schedule(*steps: tuple, **more: str) -> Schedule:
    return Schedule(2, ("attn", "mlp"), steps, **more)


@given(schedules())
def test_saving_and_loading_a_schedule_is_the_identity(found: Schedule) -> None:
    assert schedule_from_json(schedule_to_json(found).encode(), "test") == found


@given(schedules())
def test_saving_and_loading_a_plan_is_the_identity(found: Schedule) -> None:
    plan = compile_schedule(found, ModelSpec(found.depth, 8, 2, 16, 2, 2, 4, 10, False))
    assert plan_from_json(plan_to_json(plan).encode(), found, "test") == plan


def test_a_schedule_file_can_be_edited_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    schedule((C,) * 4, (R,) * 4).save(path)
    path.write_text(path.read_text().replace('"R R R R"', '"R C R C"'))
    assert Schedule.load(path).coefficients[1] == (R, C, R, C)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (schedule((C, C, R, C)), "step 0, block 1, attn: reuse at step 0"),
        (
            schedule((C,) * 4, (C, C, C, G)),
            r"step 1, block 1, mlp: gradient reads 2 history entries but only 1 is stored; compute",
        ),
        (
            schedule((C,) * 4, (R,) * 4, (R, G, R, R), history="computed"),
            "step 2, block 0, mlp: gradient reads 2",
        ),
        (schedule((C,) * 4, ((1.0,) * 5, C, C, C)), "5 coefficients, at most 4"),
        (
            schedule((C,) * 4, ((float("nan"),), C, C, C)),
            "step 1, block 0, attn: coefficients .* must be finite",
        ),
        (schedule((C,) * 4, history="other"), "history 'other' is not one of used, computed"),
        (schedule(), "1 to 10000 steps, this one has 0"),
    ],
)
def test_illegal_schedules_are_refused_with_their_place(bad: Schedule, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        check_schedule(bad)


def test_a_schedule_for_another_model_or_step_count_is_refused() -> None:
    good = schedule((C,) * 4, (R,) * 4)
    with pytest.raises(ScheduleError, match=r"2 steps but 20 are asked for; use `steps=2`"):
        compile_schedule(good, SPEC, steps=20)
    with pytest.raises(ScheduleError, match=r"2 blocks of attn\+mlp but the model has 3"):
        compile_schedule(good, ModelSpec(3, 8, 2, 16, 2, 2, 4, 10, False))


def test_short_history_falls_back_to_plain_reuse_only_where_the_schedule_says_so() -> None:
    lenient = schedule((C,) * 4, (G,) * 4, (G,) * 4, short_history="reuse")
    assert fill_short_history(lenient).coefficients[1:] == ((R,) * 4, (G,) * 4)
    strict = schedule((C,) * 4, (G,) * 4)
    assert fill_short_history(strict) is strict


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"C C C C"', '"C C C"', "step 0 has 3 actions for 4 units"),
        ('"C C C C"', '"C C X C"', "step 0, block 1, attn: unknown action 'X'"),
        ('"version": 2', '"version": 3', "format version 3, this goc_deploy reads up to 2; update"),
        ('"version": 2', '"version": 0', "format version 0, this goc_deploy reads 2; export again"),
        ('"depth": 2', '"provenance": [], "depth": 2', "provenance must be a JSON object"),
        ('"format": "goc_deploy.schedule"', '"format": "other"', "not a goc_deploy.schedule file"),
        ('"depth": 2', '"depth": 2, "depth": 2', "not valid JSON: a key stands twice"),
        ('"depth": 2', '"depth": -1', "depth must be 1 to 1000"),
        ('"depth": 2', '"depth": "2"', "depth must be 1 to 1000"),
        ('"depth": 2', '"depth": NaN', "NaN is not allowed"),
        ('"predictors"', '"predictorz"', "does not have the expected form: KeyError"),
        ("{", "[" * 100_000, "not valid JSON"),
    ],
)
def test_malformed_schedule_files_are_refused(old: str, new: str, message: str) -> None:
    text = schedule_to_json(schedule((C,) * 4, (R,) * 4)).replace(old, new, 1)
    with pytest.raises(ScheduleError, match=message):
        schedule_from_json(text.encode(), "schedule s.json")


@given(st.binary(max_size=200))
def test_no_bytes_crash_the_reader(junk: bytes) -> None:
    with pytest.raises(ScheduleError):
        schedule_from_json(junk, "junk")


def test_provenance_is_kept_and_schedules_of_the_first_version_are_read() -> None:
    bare = schedule((C,) * 4, (R,) * 4)
    learned = replace(bare, provenance={"god": {"eta": 1.0, "boundary": [0.0, 0.5]}})
    text = schedule_to_json(learned)
    assert schedule_from_json(text.encode(), "s").provenance == learned.provenance
    assert learned == bare
    first = schedule_to_json(bare).replace('"version": 2', '"version": 1')
    assert schedule_from_json(first.encode(), "s") == bare


def alternating(eta: float, steps: int, history: str = "used") -> Schedule:
    rows = [(C,) * 4, (R,) * 4, *[((C,) * 4), (gradient(eta),) * 4] * (steps // 2 - 1)]
    return schedule(*rows, history=history)


def test_a_gradient_beyond_one_is_refused_once_it_amplifies_too_much() -> None:
    check_amplification(alternating(1.0, 400))
    check_amplification(alternating(1.2, 20))
    check_amplification(alternating(1.5, 400, "computed"))
    with pytest.raises(
        ScheduleError,
        match=r"step \d+, block 0, attn: the prediction amplifies .* use an eta within -1..1",
    ):
        check_amplification(alternating(1.5, 50))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1.5, "a"], r"s\.json: predictors\.R\[1\] is 'a', it must be a number"),
        ([None], r"predictors\.R\[0\] is None"),
        ([True], r"predictors\.R\[0\] is True"),
        ("1", r"predictors\.R is '1', it must be a list of numbers"),
    ],
)
def test_a_wrong_number_in_a_file_is_named_with_its_place(
    row: object, message: str, tmp_path: Path
) -> None:
    found = json.loads(schedule_to_json(Schedule(1, ("attn", "mlp"), (((), ()), ((1.0,), (1.0,))))))
    found["predictors"]["R"] = row
    (tmp_path / "s.json").write_text(json.dumps(found))
    with pytest.raises(ScheduleError, match=message):
        Schedule.load(tmp_path / "s.json")
