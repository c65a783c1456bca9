"""Where launches find the numbers of their step."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from goc_deploy.compiler import Plan, Predict, compile_for_device, compile_for_host
from goc_deploy.policies.grammar import parse_policy
from goc_deploy.policies.resolve import schedule_from_policy
from goc_deploy.protocols import ALIGNMENT, Buffer
from goc_deploy.runtime.constants import (
    constants_from_plan,
    timesteps_from_plan,
    views_of_step,
)
from goc_deploy.spec import ModelSpec

SPEC = ModelSpec(4, 64, 4, 256, 2, 4, 4, 10, True)


@pytest.mark.parametrize("compile_plan", [compile_for_host, compile_for_device])
def test_every_launch_finds_its_own_numbers_whichever_is_bound_first(
    compile_plan: Callable[..., Plan],
) -> None:
    schedule = schedule_from_policy(parse_policy("fora:3+lagrange:2"), SPEC, 9)
    plan = compile_plan(schedule, SPEC)
    values = constants_from_plan(plan)
    assert values.dtype == np.float32
    width = values.shape[1]
    for step in reversed(range(plan.steps)):
        sampler, head, coefficients = views_of_step(
            plan, step, Buffer(0, (width,), "float32", None)
        )

        def numbers(buffer: Buffer, step: int = step) -> list[float]:
            assert buffer.pointer % ALIGNMENT == 0
            start = buffer.pointer // 4
            return values[step, start : start + buffer.shape[0]].tolist()

        assert head is None
        assert numbers(sampler) == np.float32(plan.sampler.rows[step]).tolist()
        assert len(coefficients) == len(plan.launches[step])
        for op, buffer in reversed(list(zip(plan.launches[step], coefficients, strict=True))):
            if not isinstance(op, Predict):
                assert buffer is None
                continue
            assert buffer is not None
            expected = [c for prediction in op.predictions for c in prediction.coefficients]
            assert numbers(buffer) == np.float32(expected).tolist()


def test_every_chunk_has_its_timesteps_at_an_aligned_address() -> None:
    schedule = schedule_from_policy(parse_policy("none"), SPEC, 5)
    plan = compile_for_host(schedule, SPEC)
    rows = timesteps_from_plan(plan, 2).reshape(3, -1)
    assert rows.shape[1] * 4 % ALIGNMENT == 0
    told = [*plan.sampler.timesteps, 0]  # the last chunk has one step
    np.testing.assert_array_equal(rows[:, :2].ravel(), told)
