from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from goc_deploy.errors import ScheduleError
from goc_deploy.policies.calibration import MAX_GAP
from goc_deploy.policies.grammar import parse_policy
from goc_deploy.policies.resolve import schedule_from_policy
from goc_deploy.policies.smoothcache import greedy_steps, smoothcache_from_schedule
from goc_deploy.schedule import COMPUTE, REUSE, Schedule
from goc_deploy.spec import ModelSpec

SPEC = ModelSpec(2, 8, 2, 16, 2, 2, 4, 10, False)


def made(text: str, steps: int) -> Schedule:
    return schedule_from_policy(parse_policy(text), SPEC, steps)


def test_the_furthest_step_that_changed_little_enough_is_reused_up_to() -> None:
    changes = np.full((7, MAX_GAP), 1.0)
    changes[2, 1] = 0.1  # step 2 is like step 0, though step 1 is not
    changes[4, 0] = 0.1
    assert greedy_steps(changes, 0.1) == [True, False, False, True, False, True, True]
    assert greedy_steps(changes, 0.05) == [True] * 7


@given(st.integers(1, 30), st.floats(0, 1), st.integers(0, 99))
def test_first_and_last_step_are_computed_and_never_more_than_three_in_a_row_are_not(
    steps: int, alpha: float, seed: int
) -> None:
    computed = greedy_steps(np.random.default_rng(seed).random((steps, MAX_GAP)), alpha)
    assert computed[0]
    assert computed[-1]
    assert "0000" not in "".join(str(int(c)) for c in computed)


def test_a_file_of_smoothcache_is_read_and_written(tmp_path: Path) -> None:
    path = tmp_path / "four.json"
    path.write_text('{"attn1": [1, 0, 1, 0], "mlp": [1, 0, 0, 1]}')
    schedule = made(f"smoothcache:{path}+gc:0.5", 4)
    assert schedule.policy == "smoothcache:four.json+gc:0.5"
    assert [["C" if not row else "-" for row in step[:2]] for step in schedule.coefficients] == [
        ["C", "C"],
        ["-", "-"],
        ["C", "-"],
        ["-", "C"],
    ]
    assert json.loads(smoothcache_from_schedule(schedule)) == {
        "attn": [1, 0, 1, 0],
        "mlp": [1, 0, 0, 1],
    }


def test_a_branch_that_a_file_does_not_name_is_computed(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text('{"attn": [1, 0]}')
    assert made(f"smoothcache:{tmp_path / 's.json'}", 2).coefficients[1] == (REUSE, COMPUTE) * 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"attn2": [1, 0]}', "names 'attn2' but the model has attn, mlp"),
        ('{"attn": [1, 2]}', "attn must be a list of 0"),
        ('{"attn": [1, 0, 0]}', "has 3 steps but 2 are asked for; use `steps=3`"),
        ('{"attn": [0, 0]}', "step 0"),
        ("[]", "must hold a JSON object"),
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(ScheduleError, match=message):
        made(f"smoothcache:{tmp_path / 's.json'}", 2)


def test_a_missing_file_is_refused() -> None:
    with pytest.raises(ScheduleError, match="cannot be read"):
        made("smoothcache:/nowhere/s.json", 2)


def test_a_schedule_that_differs_between_blocks_cannot_be_written() -> None:
    schedule = Schedule(2, ("attn", "mlp"), ((COMPUTE,) * 4, (REUSE, COMPUTE, COMPUTE, COMPUTE)))
    with pytest.raises(ScheduleError, match="step 1 computes attn in some blocks only"):
        smoothcache_from_schedule(schedule)
