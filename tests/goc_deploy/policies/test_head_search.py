"""The search with heads, on the golden engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from goc_deploy.api import cpu_backend
from goc_deploy.api.head_trials import EngineHeadTrials
from goc_deploy.api.laboratory import EngineLaboratory
from goc_deploy.api.plans import compiled_plan
from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.errors import UsageError
from goc_deploy.options import PlanOptions, Progress, no_progress
from goc_deploy.policies.calibration import CalibrationOptions
from goc_deploy.policies.candidates import Candidate, search_by_exchange
from goc_deploy.policies.grammar import parse_policy
from goc_deploy.policies.head import HeadOptions
from goc_deploy.policies.resolve import head_from_policy, schedule_from_policy
from goc_deploy.samplers.head import HeadFeatures
from goc_deploy.schedule import Schedule
from goc_deploy.spec import ModelSpec
from tests.goc_deploy.policies.test_search import Clock, no_calibrator
from tests.stand_ins.laboratory import StandInLaboratory

STEPS = 8
OPTIONS = CalibrationOptions(24, 5, 2.0)
SPEC = ModelSpec(2, 8, 2, 16, 2, 2, 4, 10, False)
KINDS = (
    "search:3+lagrange:1+head:patch,trials=6,search_images=16",
    "search:3+head:scalar,level=residual,trials=5,search_images=16",
    "search:3+head:patch,skip_predicted,trials=5,search_images=16",
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "goc_deploy" / "heads"


@pytest.fixture(scope="module")
def directory(golden_engine: Path) -> EngineDir:
    found = EngineDir.open(golden_engine)
    return replace(found, manifest=replace(found.manifest, max_batch=9))


def made(
    directory: EngineDir, text: str, progress: Progress = no_progress, sampler: str = "ddim"
) -> Schedule:
    laboratory = EngineLaboratory(directory, cpu_backend, sampler, OPTIONS, progress)
    return schedule_from_policy(parse_policy(text), directory.manifest.model, STEPS, laboratory)


def from_scratch(directory: EngineDir, text: str, tried: dict[str, Any]) -> float:
    """The error of a candidate that shares nothing with others."""
    head = head_from_policy(parse_policy(text))
    assert head is not None
    correction = "lagrange:1" if "lagrange:1" in text else "lagrange:2"
    spec = directory.manifest.model
    schedule = Candidate(tried["steps"], tuple(tried["computed"]), correction).plain(spec)
    if not head.skip_predicted:
        level = ",level=residual" if "residual" in text else ""
        computed = ",".join(map(str, tried["computed"]))
        policy = parse_policy(f"compute:{computed}+{correction}{level}")
        schedule = schedule_from_policy(policy, spec, tried["steps"])
    images = replace(OPTIONS, images=16)
    trials = EngineHeadTrials(directory, cpu_backend(), "ddim", head, images, no_progress)
    error = trials.error(schedule, tried["features"])
    trials.remove()
    return error


@pytest.mark.parametrize("text", KINDS)
def test_the_steps_with_the_least_error_of_fits_from_scratch_are_chosen(
    directory: EngineDir, text: str
) -> None:
    schedule = made(directory, text)
    record: Any = schedule.provenance["search"]
    tried = record["tried"]
    assert len(tried) == record["trials"] == int(text.split("trials=")[1][0])
    assert {one["steps"] for one in tried} == {STEPS}
    assert len({tuple(one["computed"]) for one in tried}) == len(tried)
    errors = [from_scratch(directory, text, one) for one in tried]
    assert errors == pytest.approx([one["error"] for one in tried], rel=1e-6)
    assert errors[0] == min(errors)
    assert tried[0]["computed"] == record["computed"]
    computed = [k for k, rows in enumerate(schedule.coefficients) if not any(rows)]
    assert computed == record["computed"]
    assert record["calibration"]["judging_images"] == 8


class Killed(Exception):
    """Stands for the end of a process."""


def test_a_killed_search_goes_on_and_chooses_the_same(directory: EngineDir) -> None:
    text = KINDS[0]
    calls: list[str] = []
    whole = made(directory, text, lambda what, *_: calls.append(what))
    assert made(directory, text) == whole  # from the list of what is measured
    again: list[str] = []
    made(directory, text, lambda what, *_: again.append(what))
    assert not any("step" in what for what in again)
    EngineHeadTrials(
        directory,
        cpu_backend(),
        "ddim",
        head_from_policy(parse_policy(text)) or HeadOptions(),
        replace(OPTIONS, images=16),
        no_progress,
    ).remove()
    for after in (len(calls) // 3, len(calls) // 4):
        left = iter(range(after))

        def killing(*_: object, left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                raise Killed

        with pytest.raises(Killed):
            made(directory, text, killing)
    resumed: list[str] = []
    assert made(directory, text, lambda what, *_: resumed.append(what)) == whole
    assert len(resumed) < 0.7 * len(calls)


def test_a_trial_goes_on_where_it_differs_from_the_best(directory: EngineDir) -> None:
    head = HeadOptions("patch")
    images = replace(OPTIONS, images=16)
    calls: list[str] = []
    trials = EngineHeadTrials(
        directory, cpu_backend(), "ddim", head, images, lambda what, *_: calls.append(what)
    )
    spec = directory.manifest.model
    trials.error(Candidate(STEPS, (0, 2, 4), "lagrange:1").plain(spec), "patch")
    calls.clear()
    trials.error(Candidate(STEPS, (0, 2, 5), "lagrange:1").plain(spec), "patch")
    steps = sorted({what for what in calls if "step" in what})
    assert steps == [f"head, step {step} of {STEPS}" for step in range(5, STEPS + 1)]


def test_a_plan_is_searched_then_fitted_and_nothing_is_left(
    directory: EngineDir, cache: Path
) -> None:
    text = "search:3+head:hidden,trials=4,search_images=16,steps=6,images=16"
    options = PlanOptions(cfg_scale=2.0)
    plan = compiled_plan(directory, text, options, cpu_backend)
    assert plan.sampler.head is not None
    record: Any = plan.schedule.provenance["search"]
    assert [one["features"] for one in record["tried"]] == ["hidden"] * 3 + ["patch"] * 4
    assert record["features"] == "hidden"
    assert record["correction"] == "lagrange:2"
    assert plan.schedule.provenance["head"]["calibration"]["images"] == 16  # type: ignore[index]
    assert not list(cache.iterdir())


def test_several_step_counts_are_tried_towards_the_converged_solution(
    directory: EngineDir,
) -> None:
    text = "search:2+head:scalar,target=converged,skip_predicted,trials=3,search_images=16"
    schedule = made(directory, text)
    record: Any = schedule.provenance["search"]
    assert record["target"] == "converged"
    assert "correction" not in record
    assert {one["steps"] for one in record["tried"]} == {8}


class Ranks:
    """Head trials whose error is a sum over the computed steps."""

    def error(self, schedule: Schedule, features: HeadFeatures) -> float:
        del features
        return sum(k for k, rows in enumerate(schedule.coefficients) if not any(rows))

    def describe(self) -> dict[str, Any]:
        return {}


class HeadLaboratory(StandInLaboratory):
    """A laboratory whose head trials are `Ranks`."""

    @contextmanager
    def head_trials(self, options: HeadOptions, images: int) -> Iterator[Ranks]:
        del options, images
        yield Ranks()


@pytest.mark.parametrize(
    ("text", "computed"),
    [
        ("search:31ms+head,steps=4", 3),
        ("search:31ms+head,steps=8,skip_predicted", 3),
        ("search:29ms+head,steps=8,skip_predicted", 2),
    ],
)
def test_steps_that_are_left_out_take_no_time_of_the_budget(text: str, computed: int) -> None:
    laboratory = HeadLaboratory(no_calibrator, Clock)
    schedule = schedule_from_policy(parse_policy(text), SPEC, 20, laboratory)
    assert sum(not any(rows) for rows in schedule.coefficients) == computed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("search:5ms+head,steps=4", "pays for no computed step"),
        ("search:4+head,steps=4", "pays for all 4 steps, so there is nothing to search"),
        ("search:20+head", "pays for all 20 steps"),
        ("search:3+head,reference=20", "option reference is for a search without a head"),
        ("search:3+head,search_images=8", "search_images must be a whole number within 16"),
        ("search:3+head,trials=0", "trials must be a whole number within 1..10000"),
        ("search:3,trials=5", "option trials is for a search with a head"),
        ("search:3,search_images=16", "option search_images is for a search with a head"),
    ],
)
def test_bad_searches_with_heads_are_refused(text: str, message: str) -> None:
    laboratory = HeadLaboratory(no_calibrator, Clock)
    with pytest.raises(UsageError, match=message):
        schedule_from_policy(parse_policy(text), SPEC, 20, laboratory)


@pytest.mark.parametrize("target", ["uncached", "converged"])
def test_a_search_for_a_sampler_with_noise_is_refused(directory: EngineDir, target: str) -> None:
    with pytest.raises(UsageError, match="draws fresh noise"):
        made(directory, f"search:3+head,target={target}", sampler="ddim:0.5")


def test_exchange_finds_steps_next_to_even_ones_within_its_trials() -> None:
    target = (0, 3, 5, 12, 19)
    asked: list[Candidate] = []

    def measure(candidate: Candidate) -> float:
        asked.append(candidate)
        return sum(abs(a - b) for a, b in zip(candidate.computed, target, strict=True))

    found = search_by_exchange([(20, 5)], "lagrange:2", measure, 100)
    assert found[0] == (0, Candidate(20, target, "lagrange:2"))
    assert len(set(asked)) == len(asked) == len(found) <= 100
    asked.clear()
    assert len(search_by_exchange([(20, 5)], "lagrange:2", measure, 9)) == len(asked) == 9


def test_runs_move_before_single_steps_so_that_wide_gaps_are_passed_over() -> None:
    target = (0, 3, 6, 8, 10, 11, 12, 14, 16, 18)

    def measure(candidate: Candidate) -> float:  # a gap of 3 costs much unless it is an early one
        gaps = [b - a for a, b in pairwise(candidate.computed)]
        wide = sum(gap > 2 for gap in gaps[2:])
        away = sum(abs(a - b) for a, b in zip(candidate.computed, target, strict=True))
        return away + 100 * wide

    found = search_by_exchange([(20, 10)], "lagrange:2", measure, 64)
    assert found[0][1].computed == target
