"""Random legal schedules."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from goc_deploy.schedule import COMPUTE, REUSE, Schedule, gradient
from goc_deploy.spec import ModelSpec

PREDICTORS = [
    REUSE,
    gradient(0.5),
    gradient(1.2),
    (1.875, -1.25, 0.375),
    (0.9,),
    (0.4, 0.3, 0.2, 0.1),
]


@st.composite
def residual_schedules(draw: st.DrawFn, depth: int | None = None) -> Schedule:
    """Legal schedules that predict the residual of whole steps."""
    depth = depth or draw(st.integers(1, 4))
    history = draw(st.sampled_from(["used", "computed"]))
    stored, rows = 0, []
    for step in range(draw(st.integers(1, 9))):
        wanted = draw(st.sampled_from([COMPUTE, *PREDICTORS]))
        row = wanted if step and len(wanted) <= stored else COMPUTE
        stored += not row or history == "used"
        rows.append((row,) * (2 * depth))
    return Schedule(depth, ("attn", "mlp"), tuple(rows), history, level="residual")


@st.composite
def schedules(draw: st.DrawFn, depth: int | None = None, max_steps: int = 9) -> Schedule:
    """Legal schedules of models of equal blocks."""
    depth = depth or draw(st.integers(1, 4))
    return draw(schedules_of(ModelSpec(depth, 8, 2, 16, 2, 2, 4, 10, False), max_steps))


@st.composite
def schedules_of(draw: st.DrawFn, spec: ModelSpec, max_steps: int = 9) -> Schedule:
    """Legal schedules; whole steps are often of one action, as real policies make them."""
    units, steps, history = (
        spec.units,
        draw(st.integers(1, max_steps)),
        draw(st.sampled_from(["used", "computed"])),
    )
    stored, rows = [0] * units, []
    for step in range(steps):
        whole = draw(st.sampled_from([None, COMPUTE, *PREDICTORS]))
        row = []
        for unit in range(units):
            wanted = draw(st.sampled_from([COMPUTE, *PREDICTORS])) if whole is None else whole
            action = (
                wanted
                if step and len(wanted) <= stored[unit]
                else (REUSE if step and wanted and stored[unit] else COMPUTE)
            )
            stored[unit] += not action or history == "used"
            row.append(action)
        rows.append(tuple(row))
    return replace(Schedule.of(spec, tuple(rows)), history=history)
