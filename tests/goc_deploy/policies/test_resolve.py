from __future__ import annotations

from pathlib import Path

import pytest
import torch

from goc_deploy.errors import ModelError, ScheduleError, UsageError
from goc_deploy.exporters.router import router_probabilities
from goc_deploy.policies.grammar import check_plan_name, parse_policy
from goc_deploy.policies.resolve import schedule_from_policy
from goc_deploy.schedule import COMPUTE, REUSE, Schedule, gradient
from goc_deploy.spec import ModelSpec

SPEC = ModelSpec(2, 8, 2, 16, 2, 2, 4, 10, False)


def made(text: str, steps: int = 20) -> Schedule:
    return schedule_from_policy(parse_policy(text), SPEC, steps, read_router=router_probabilities)


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


def test_fora_can_count_back_from_the_last_step() -> None:
    assert steps_with(made("fora:2,phase=last"), REUSE) == list(range(2, 19, 2))
    assert steps_with(made("fora:3,phase=last"), COMPUTE) == [0, 1, 4, 7, 10, 13, 16, 19]


def test_named_steps_are_computed_and_take_corrections() -> None:
    assert steps_with(made("compute:0,3,6", steps=8), COMPUTE) == [0, 3, 6]
    assert steps_with(made("compute:6,3,0,3", steps=8), COMPUTE) == [0, 3, 6]
    assert steps_with(made("compute:0,3+lagrange:0", steps=5), REUSE) == [1, 2, 4]


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


def test_a_file_is_recorded_by_its_name_alone(tmp_path: Path) -> None:
    made("fora:2").save(tmp_path / "mine.json")
    assert made(f"file:{tmp_path / 'mine.json'}+gc:1.2").policy == "file:mine.json+gc:1.2"


@pytest.mark.parametrize(
    ("correction", "row"),
    [
        ("taylor:1", (1.5, -0.5)),
        ("taylor", (1.625, -0.75, 0.125)),
        ("lagrange", (1.875, -1.25, 0.375)),
        ("hermite:1", (1.25, -0.25)),
        ("hermite:2", (1.21875, -0.1875, -0.03125)),
        ("hermite:1:1", (2.0, -1.0)),
    ],
)
def test_polynomial_predictors_read_computed_features(
    correction: str, row: tuple[float, ...]
) -> None:
    schedule = made(f"fora:2+{correction}")
    assert schedule.history == "computed"
    assert steps_with(schedule, REUSE) == [1]
    assert steps_with(schedule, row) == list(range(2 * len(row) - 1, 20, 2))


def router_file(folder: Path, rows: list[list[float]]) -> Path:
    path = folder / "router.pt"
    torch.save({"routers": {f"{i}.prob": torch.tensor(row) for i, row in enumerate(rows)}}, path)
    return path


def test_a_router_counts_steps_down_and_reuses_in_odd_steps_only(tmp_path: Path) -> None:
    low, high = -9.0, 9.0
    rows = [
        [low, high, high, high],
        [low] * 4,
        [high, high, low, low],
        [low] * 4,
    ]  # steps 3, 2, 1, 0
    schedule = made(f"l2c:{router_file(tmp_path, rows)}", steps=4)
    expected = (
        (COMPUTE,) * 4,
        (COMPUTE, COMPUTE, REUSE, REUSE),
        (COMPUTE,) * 4,
        (REUSE, COMPUTE, COMPUTE, COMPUTE),
    )
    assert schedule.coefficients == expected
    assert made(f"l2c:{tmp_path / 'router.pt'}@0.99999", steps=4).coefficients[1] == (REUSE,) * 4


def test_both_branches_undoes_a_correction_in_blocks_that_compute_one(tmp_path: Path) -> None:
    low, high = -9.0, 9.0
    path = router_file(tmp_path, [[low, high, low, low], [low] * 4, [low] * 4, [low] * 4])
    assert made(f"l2c:{path}+gc:0.8", steps=4).coefficients[3] == (
        gradient(0.8),
        COMPUTE,
        *[gradient(0.8)] * 2,
    )
    both = made(f"l2c:{path}+gc:0.8,both_branches", steps=4)
    assert both.coefficients[3] == (REUSE, COMPUTE, *[gradient(0.8)] * 2)


def test_a_router_that_is_not_there_is_refused() -> None:
    with pytest.raises(
        ModelError, match=r"SPEC 'l2c:/nowhere/router.pt': .* cannot be read: No such file"
    ):
        made("l2c:/nowhere/router.pt")


def test_a_router_for_another_model_or_step_count_is_refused(tmp_path: Path) -> None:
    path = router_file(tmp_path, [[0.0] * 4] * 6)
    with pytest.raises(UsageError, match="for 6 steps but 4 are asked for; use `steps=6`"):
        made(f"l2c:{path}", steps=4)
    path = router_file(tmp_path, [[0.0] * 56] * 4)
    with pytest.raises(
        UsageError, match=r"for 56 units but the model has 4 \(2 blocks of attn\+mlp\)"
    ):
        made(f"l2c:{path}", steps=4)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("fora:2+gc:1.2", "fora-2+gc-1.2"),
        ("none", "none"),
        ("file:/a/b/mine.json", "file-mine"),
        ("fora:2+gc,history=computed", "fora-2+gc,history=computed"),
        ("fora:2+steps:3,5:1.2,both_branches", "fora-2+steps-3,5-1.2,both_branches"),
        ("l2c:a+b/router.v1.pt@0.1+gc:0.8,both_branches", "l2c-router.v1@0.1+gc-0.8,both_branches"),
        ("l2c:me@home/router.pt", "l2c-router"),
    ],
)
def test_the_default_name_is_the_spec_made_file_safe(text: str, name: str) -> None:
    assert parse_policy(text).default_name == name
    assert check_plan_name(name) == name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "unknown policy ''"),
        (
            "goc",
            "unknown policy 'goc'; it predicts what a policy reuses, so it comes after one, such "
            "as fora:2.goc",
        ),
        ("+goc", "unknown policy ''; begin with what is computed, such as fora:2"),
        ("fora-2", r"unknown policy 'fora-2'; did you mean fora:2\?"),
        ("fore:2", r"unknown policy 'fore'; did you mean fora\?"),
        ("xyz", "unknown policy 'xyz'; the policies are none, fora,"),
        ("fora:2+gc-1.2", r"unknown correction 'gc-1.2'; did you mean \+gc:1.2\?"),
        ("fora:2+talyor", r"unknown correction 'talyor'; did you mean \+taylor\?"),
        ("fora", "interval must be a whole number within 1..1000, got ''"),
        ("fora:0", "interval must be .*, got '0'"),
        ("fora:2.5", "interval must be .*, got '2.5'"),
        ("fora:2@0", "fraction must be a number above 0 and at most 1, got '0'"),
        ("fora:2@x", "fraction must be .*, got 'x'"),
        ("fora:2@nan", "fraction must be .*, got 'nan'"),
        ("fora:2+gc:x", "eta must be a number below 1000 in magnitude, got 'x'"),
        ("fora:2+gc:inf", "eta must be .*, got 'inf'"),
        ("fora:2+steps:3,x:1", "steps must be whole numbers separated by commas, got '3,x'"),
        ("fora:2+steps:20:1", "step 20 is beyond the last step 19"),
        ("compute", "steps must be whole numbers separated by commas, got ''"),
        ("compute:0,-3", "steps must be whole numbers separated by commas, got '0,-3'"),
        ("compute:1,3", "step 0 has nothing to reuse; name it among the computed steps"),
        ("compute:0,20", "step 20 is beyond the last step 19"),
        ("fora:2+gc+gc", "too many parts"),
        ("fora:2+other", "unknown correction 'other'"),
        ("none:1", "'none' takes no argument, got '1'"),
        ("fora:2,history=old", "option history must be used or computed, got 'old'"),
        ("fora:2,phase=middle", "option phase must be first or last, got 'middle'"),
        ("fora:2,eta=1", "option 'eta' is not one of history, level, phase"),
        ("fora:2,both_branches", "option 'both_branches' is not one of history, level, phase"),
        ("none+gc,phase=last", "option 'phase' is not one of history, level, both_branches"),
        ("fora:2,history=used,history=used", "an option is given twice"),
        ("fora:2+taylor:4", "order must be a whole number within 0..3, got '4'"),
        ("fora:2+lagrange:x", "order must be .*, got 'x'"),
        ("fora:2+hermite:1:y", "sigma must be .*, got 'y'"),
        ("fora:2+taylor:1,history=used", "reads computed features only"),
        ("l2c:", "router must be the path of a file, got ''"),
        ("l2c:router.pt@1.5", "threshold must be a number within 0..1, got '1.5'"),
        ("file:", "schedule must be the path of a file, got ''"),
        ("fora:2,flag", "option 'flag' is not one of history, level, phase"),
        ("fora:2+gc,both_branches=1", "option both_branches must be written without a value"),
        ("fora:2,phase", "option phase must be first or last, got ''"),
        (
            "fora:2+fit,both_branches",
            "option 'both_branches' is not one of history, level, phase, fit",
        ),
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


def test_only_the_path_of_a_file_counts_as_one() -> None:
    assert parse_policy("smoothcache:0.3").path == ""
    assert parse_policy("smoothcache:a/b.json+gc").path == "a/b.json"
    assert parse_policy("l2c:a@b/c.pt@0.2").path == "a@b/c.pt"
    assert parse_policy("fora:2").path == parse_policy("unknown:a/b.json").path == ""


@pytest.mark.parametrize("path", ["a,b.json", "fora-2,both_branches.json"])
def test_a_comma_in_a_path_begins_an_option_only_before_a_name(path: str) -> None:
    assert parse_policy(f"file:{path}+gc:1.2").path == path
    assert parse_policy(f"file:{path}").options == ()
