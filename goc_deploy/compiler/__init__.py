"""Schedules to plans: `passes` has the entries, one per form; a `plan.Plan` is the result."""

from goc_deploy.compiler.check import check_plan
from goc_deploy.compiler.passes import compile_for_device, compile_for_host, in_form
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
    "compile_for_device",
    "compile_for_host",
    "in_form",
]
