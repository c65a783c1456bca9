"""The search on the golden engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from goc_deploy.api import add_plan, cpu_backend
from goc_deploy.api.laboratory import EngineLaboratory
from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.errors import CalibrationNeededError, UsageError
from goc_deploy.metrics.paired import whole_relative_l2
from goc_deploy.options import no_progress
from goc_deploy.policies.calibration import CalibrationOptions, Laboratory, Trial
from goc_deploy.policies.candidates import uncached
from goc_deploy.policies.grammar import parse_policy
from goc_deploy.policies.resolve import schedule_from_policy
from goc_deploy.samplers import SamplerTable, sampler_table
from goc_deploy.samplers.process import Process
from goc_deploy.schedule import COMPUTE, REUSE, Schedule
from goc_deploy.spec import ModelSpec
from tests.stand_ins.laboratory import StandInLaboratory

SPEC = ModelSpec(2, 8, 2, 16, 2, 2, 4, 10, False)
OPTIONS = CalibrationOptions(images=2, seed=3, cfg_scale=2.0)


@pytest.fixture(scope="module")
def laboratory(golden_engine: Path) -> Laboratory:
    directory = EngineDir.open(golden_engine)
    return EngineLaboratory(directory, cpu_backend, "ddim", OPTIONS, no_progress)


def made(text: str, laboratory: Laboratory | None, spec: ModelSpec) -> Schedule:
    return schedule_from_policy(parse_policy(text), spec, 20, laboratory)


@pytest.fixture(scope="module")
def golden_spec(golden_engine: Path) -> ModelSpec:
    return EngineDir.open(golden_engine).manifest.model


def computed_steps(schedule: Schedule) -> list[int]:
    return [k for k, rows in enumerate(schedule.coefficients) if set(rows) == {COMPUTE}]


def test_a_search_beats_even_spacing_and_says_by_how_much(
    laboratory: Laboratory, golden_spec: ModelSpec
) -> None:
    schedule = made("search:3,steps=9,reference=40", laboratory, golden_spec)
    record: Any = schedule.provenance["search"]
    assert computed_steps(schedule) == record["computed"]
    assert (schedule.steps, len(record["computed"])) == (9, 3)
    trials = laboratory.trials()
    expected = trials.run(uncached(golden_spec, 40), OPTIONS).latents

    def error(tried: Schedule) -> float:
        return whole_relative_l2(trials.run(tried, OPTIONS).latents, expected)

    assert error(schedule) == pytest.approx(record["error"], rel=1e-4)
    even = (made(f"fora:3+{p}", None, golden_spec) for p in ("gc:1.0", "lagrange:2"))
    nine = [Schedule(s.depth, s.branches, s.coefficients[:9], s.history) for s in even]
    assert record["error"] <= min(map(error, nine)) + 1e-6
    assert record["held_out_seed"] == OPTIONS.seed + 1
    assert record["held_out_error"] > 0


def test_the_step_count_is_chosen_too(laboratory: Laboratory, golden_spec: ModelSpec) -> None:
    schedule = made("search:2+lagrange:1,reference=20", laboratory, golden_spec)
    record: Any = schedule.provenance["search"]
    assert len(computed_steps(schedule)) == 2
    assert {tried["steps"] for tried in record["best"]} <= {2, 4, 6, 8, 10, 12, 16, 20}
    assert schedule.steps == record["steps"]
    assert {tried["correction"] for tried in record["best"]} == {"lagrange:1"}


def test_a_fit_learns_on_the_schedule_that_was_found(
    laboratory: Laboratory, golden_spec: ModelSpec
) -> None:
    schedule = made("search:2+fit,steps=4,reference=20", laboratory, golden_spec)
    assert {"search", "fit"} <= set(schedule.provenance)
    assert computed_steps(schedule) == schedule.provenance["search"]["computed"]  # type: ignore[index]


class Clock:
    """Trials with full steps of 10 ms and predicted steps of 1 ms.

    Their latents tell what ran.
    """

    sampler, options, progress = "ddim", OPTIONS, staticmethod(no_progress)

    def table(self, steps: int) -> SamplerTable:
        return sampler_table(self.sampler, steps, Process("eps"))

    def run(self, schedule: Schedule, images: CalibrationOptions) -> Trial:
        computed = sum(not any(rows) for rows in schedule.coefficients)
        latents = np.full((images.images, 1), 1000.0 + computed + 0.001 * schedule.steps)
        return Trial(latents, 10.0 * computed + 1.0 * (schedule.steps - computed), {"full": 10.0})

    def aim(self, schedule: Schedule, images: CalibrationOptions) -> np.ndarray:
        return self.run(schedule, images).latents

    def describe(self) -> dict[str, Any]:
        return {}


def no_calibrator(_steps: int) -> Any:
    raise AssertionError("a search asks for trials only")


@pytest.mark.parametrize(
    ("text", "computed"),
    [("search:31ms,steps=4", 3), ("search:40ms,steps=13", 3), ("search:2,steps=4", 2)],
)
def test_a_budget_in_milliseconds_is_spent_on_as_many_computed_steps_as_fit(
    text: str, computed: int
) -> None:
    schedule = made(f"{text},reference=20", StandInLaboratory(no_calibrator, Clock), SPEC)
    assert len(computed_steps(schedule)) == computed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "search:",
            "budget must be a whole number within 1..400 or a number above 0 and below 1000 "
            "followed by ms, got ''",
        ),
        ("search:2.5", "budget must be a whole number within 1..400 .*, got '2.5'"),
        ("search:0", "budget must be .*, got '0'"),
        ("search:xms", "budget must be .*, got 'xms'"),
        ("search:-1ms", "budget must be .*, got '-1ms'"),
        ("search:5ms,steps=4", "pays for no computed step"),
        ("search:2,steps=0", "option steps must be a whole number within 1..400, got '0'"),
        ("search:2,reference=1", "option reference must be .* within 2..1000, got '1'"),
        ("search:2,units", "option 'units' is not one of history, level, steps, reference"),
        ("search:2,phase=last", "option 'phase' is not one of history, level, steps, reference"),
    ],
)
def test_bad_searches_are_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        made(text, StandInLaboratory(no_calibrator, Clock), SPEC)


def test_a_search_needs_an_engine_and_a_sampler_without_noise(
    golden_engine: Path, golden_spec: ModelSpec
) -> None:
    with pytest.raises(CalibrationNeededError, match="needs an engine directory"):
        made("search:2", None, SPEC)
    directory = EngineDir.open(golden_engine)
    noisy = EngineLaboratory(directory, cpu_backend, "ddim:0.5", OPTIONS, no_progress)
    with pytest.raises(UsageError, match="draws fresh noise"):
        made("search:2", noisy, golden_spec)


def test_steps_beside_a_search_are_refused(golden_engine: Path) -> None:
    with pytest.raises(UsageError, match="use the option ,steps=9 in the SPEC"):
        add_plan(golden_engine, "search:3", steps=9)


def test_a_schedule_that_reuses_plainly_is_left_to_the_correction(golden_spec: ModelSpec) -> None:
    schedule = made(
        "search:2+hermite:1,steps=4,reference=20",
        StandInLaboratory(no_calibrator, Clock),
        golden_spec,
    )
    rows = {row for step in schedule.coefficients for row in step}
    assert rows <= {
        COMPUTE,
        REUSE,
        *(row for step in schedule.coefficients for row in step if len(row) == 2),
    }
    assert schedule.policy == "search:2+hermite:1,steps=4,reference=20"
