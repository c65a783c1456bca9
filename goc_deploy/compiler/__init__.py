"""Schedules to plans: `passes.compile_schedule` is the entry, a `plan.Plan` the result."""

from goc_deploy.compiler.check import check_plan
from goc_deploy.compiler.passes import compile_schedule, with_stacks
from goc_deploy.compiler.plan import Collect, Compute, Launch, Plan, Predict, Prediction, Segment

__all__ = [
    "Collect",
    "Compute",
    "Launch",
    "Plan",
    "Predict",
    "Prediction",
    "Segment",
    "check_plan",
    "compile_schedule",
    "with_stacks",
]
