from __future__ import annotations

from typing import get_args

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from goc_deploy.compiler import Predict, compile_for_host, in_form
from goc_deploy.compiler.plan import PlanForm
from goc_deploy.runtime.buffers import (
    aligned_rows,
    coefficient_places,
    coefficient_row,
    step_rows,
    step_size,
)
from goc_deploy.schedule import Schedule
from goc_deploy.spec import ModelSpec
from tests.goc_deploy.strategies import schedules


@given(schedules(), st.sampled_from(get_args(PlanForm)))
def test_every_launch_finds_its_coefficients_in_the_constants_of_its_step(
    schedule: Schedule, form: PlanForm
) -> None:
    spec = ModelSpec(schedule.depth, 8, 2, 16, 2, 2, 4, 10, False)
    plan = in_form(compile_for_host(schedule, spec), spec, form)
    for step, launches in enumerate(plan.launches):
        constants = aligned_rows(step_rows(plan, step), step_size(plan))
        for op, place in zip(launches, coefficient_places(plan, step), strict=True):
            assert (place is None) != isinstance(op, Predict)
            if place is not None:
                row = np.array(coefficient_row(op), np.float32)
                np.testing.assert_array_equal(constants[place.start : place.stop], row)
