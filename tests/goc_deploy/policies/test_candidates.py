from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from goc_deploy.errors import UsageError
from goc_deploy.policies.candidates import Candidate, search, sizes_for, spread, warped
from goc_deploy.schedule import COMPUTE, check_schedule
from goc_deploy.spec import ModelSpec

SPEC = ModelSpec(2, 8, 2, 16, 2, 2, 4, 10, False)


@given(
    st.integers(1, 60).flatmap(
        lambda steps: st.tuples(
            st.just(steps), st.integers(1, steps), st.integers(0, (steps - 1) // 3)
        )
    ),
    st.tuples(*[st.floats(0.25, 4.0)] * 3),
)
def test_spread_steps_rise_from_zero(
    sizes: tuple[int, int, int], densities: tuple[float, float, float]
) -> None:
    steps, count, tail = sizes
    places = spread(steps, count, densities, tail)
    assert len(set(places)) == count
    assert list(places) == sorted(places)
    assert places[0] == 0
    assert places[-1] < steps


def test_equal_densities_are_an_even_spacing_and_a_denser_third_has_more_steps() -> None:
    assert spread(20, 10, (1, 1, 1), 1) == warped(20, 10, 1.0, 1)
    assert spread(20, 10, (2, 4, 3), 1) == (0, 3, 6, 8, 9, 10, 12, 14, 16, 18)
    assert spread(5, 1, (1, 2, 1), 0) == (0,)


@given(st.integers(1, 60), st.floats(0.2, 5), st.data())
def test_warped_spacing_gives_rising_steps_that_start_at_zero(
    count: int, warp: float, data: st.DataObject
) -> None:
    steps = data.draw(st.integers(count, 300))
    tail = data.draw(st.integers(0, steps - count))
    found = warped(steps, count, warp, tail)
    assert len(found) == count
    assert found[0] == 0
    assert all(a < b for a, b in pairwise(found))
    assert found[-1] <= steps - 1


def test_even_spacing_is_every_nth_step_and_warps_are_denser_at_one_end() -> None:
    assert warped(20, 5, 1.0, 3) == (0, 4, 8, 12, 16)
    early, late = warped(40, 5, 2.0, 0), warped(40, 5, 0.5, 0)
    assert early[1] - early[0] < early[4] - early[3]
    assert late[1] - late[0] > late[4] - late[3]


def test_candidates_are_legal_schedules_that_compute_their_steps() -> None:
    schedule = Candidate(9, (0, 2, 7), "gc:1.0").plain(SPEC)
    check_schedule(schedule)
    assert [k for k, rows in enumerate(schedule.coefficients) if set(rows) == {COMPUTE}] == [
        0,
        2,
        7,
    ]


def test_the_search_finds_uneven_steps_the_step_count_and_the_correction() -> None:
    target = (0, 3, 5, 12, 19)
    asked: list[Candidate] = []

    def measure(candidate: Candidate) -> float:
        asked.append(candidate)
        away = sum(abs(a - b) for a, b in zip(candidate.computed, target, strict=True))
        return away + 100 * abs(candidate.steps - 20) + 50 * (candidate.correction != "taylor:2")

    found = search([(5, 5), (10, 5), (20, 5), (30, 5)], ("lagrange:1", "taylor:2"), measure)
    evenly = min(measure(Candidate(20, warped(20, 5, 1.0, tail), "taylor:2")) for tail in (0, 3))
    assert (found[0][1].steps, found[0][1].correction) == (20, "taylor:2")
    assert found[0][0] < evenly
    assert [error for error, _ in found] == sorted(error for error, _ in found)
    assert len(set(asked[:-2])) == len(asked) - 2  # each is measured once
    assert search([(5, 5), (10, 5), (20, 5), (30, 5)], ("lagrange:1", "taylor:2"), measure) == found


def test_step_counts_are_multiples_of_what_is_computed_unless_one_is_asked_for() -> None:
    assert sizes_for(lambda _: 10, None) == [(n, 10) for n in (10, 20, 30, 40, 50, 60, 80, 100)]
    assert sizes_for(lambda _: 200, None) == [(200, 200), (400, 200)]
    assert sizes_for(lambda _: 10, 25) == [(25, 10)]
    assert sizes_for(lambda _: 10, 8) == [(8, 8)]


def test_step_counts_stay_within_what_is_searched() -> None:
    assert sizes_for(lambda _: 5000, None) == [(400, 400)]


def test_a_budget_of_time_pays_for_fewer_computed_steps_where_there_are_more_in_all() -> None:
    sizes = sizes_for(
        lambda steps: int((100 - steps) / 9), None
    )  # a computed step takes 10 ms, a cached one 1 ms
    assert sizes[:3] == [(11, 9), (22, 8), (33, 7)]
    with pytest.raises(UsageError, match="pays for no computed step"):
        sizes_for(lambda _: 0, 20)
