"""What the tables of docs/results.md tell of a plan."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.make_checkpoint import spec_of
from benchmarks.rows import Row, caching_level, contents_of, god_text, teraflops_per_image
from goc_deploy.policies.grammar import parse_policy
from goc_deploy.policies.resolve import schedule_from_policy
from goc_deploy.schedule import Schedule
from goc_deploy.schedule.operations import full_step_flops

SPEC = spec_of("S/2", 256)


def schedule_of(policy: str, steps: int = 20) -> Schedule:
    return schedule_from_policy(parse_policy(policy), SPEC, steps)


def test_the_caching_level_is_the_share_that_is_not_computed() -> None:
    levels = [
        caching_level(contents_of(schedule_of(spec)))
        for spec in ("none", "fora:2", "fora:2@0.5+gc:1.0")
    ]
    assert levels == [0, 50, 25]


def test_operations_are_those_of_the_matrix_products() -> None:
    full, half = (
        teraflops_per_image(contents_of(schedule_of(spec)), SPEC) for spec in ("none", "fora:2")
    )
    outside = 2 * full - 2 * half
    table = 2 * 20 * 2 * SPEC.hidden * (6 * SPEC.depth + 2) * SPEC.hidden / 1e12
    assert full == pytest.approx(20 * full_step_flops(SPEC, 2) / 1e12 + table, rel=1e-6)
    assert (
        0 < full - outside < 0.03 * full
    )  # what no cache saves: modulation, embedding, final layer


def test_what_god_decided_is_told_with_its_strength() -> None:
    schedule = schedule_of("fora:2", 10)
    assert "god" not in contents_of(schedule)
    for threshold, steps, text in (
        (2.0, [3, 5, 7, 9], "eta 0.8, everywhere"),
        (0.0, [], "eta 0.8, nowhere"),
        (0.4, [3, 5, 9], "eta 0.8, 3 of 5 cached steps: 3 to 5, 9"),
    ):
        god = {"eta": 0.8, "threshold": threshold, "gradient_steps": steps, "gamma": 0.5}
        contents = contents_of(replace(schedule, provenance={"god": god}))
        assert contents["god"]["reused_steps"] == [1, 3, 5, 7, 9]
        assert god_text(contents["god"]) == text


def test_a_row_names_its_plan_by_steps_and_sampler() -> None:
    assert Row("", "fora:2").plan == "fora-2.T20"
    assert Row("", "none", 8, "dpm++:2").plan == "none.T8.dpm++-2"
