from __future__ import annotations

import pytest

from goc_deploy.compiler import compile_schedule
from goc_deploy.errors import ScheduleError
from goc_deploy.schedule import (
    Schedule,
    check_amplification,
    check_schedule,
    fill_short_history,
    gradient,
)
from goc_deploy.spec import ModelSpec

SPEC = ModelSpec(2, 8, 2, 16, 2, 2, 4, 10, False)
C, R, G = (), (1.0,), (2.0, -1.0)


def schedule(*steps: tuple, **more: str) -> Schedule:
    return Schedule(2, ("attn", "mlp"), steps, **more)


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
