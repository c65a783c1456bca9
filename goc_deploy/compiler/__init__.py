"""From schedules to plans: `passes` has one function per form, and `plan.Plan` is the result."""

from goc_deploy.compiler.check import check_plan
from goc_deploy.compiler.passes import compile_for_device, compile_for_host, in_form
from goc_deploy.compiler.plan import (
    Collect,
    Compute,
    Launch,
    Plan,
    Predict,
    Prediction,
    Residual,
    Segment,
)

compile_schedule = compile_for_host  # the form that engine directories hold

__all__ = [
    "Collect",
    "Compute",
    "Launch",
    "Plan",
    "Predict",
    "Prediction",
    "Residual",
    "Segment",
    "check_plan",
    "compile_for_device",
    "compile_for_host",
    "compile_schedule",
    "in_form",
]
