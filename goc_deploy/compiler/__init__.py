"""From schedules to plans: `forms` has one function per form, and `plan.Plan` is the result."""

from goc_deploy.compiler.check import check_plan
from goc_deploy.compiler.forms import (
    compile_for_device,
    compile_for_host,
    compile_to_sums,
    in_form,
)
from goc_deploy.compiler.plan import (
    Accumulate,
    AddSum,
    Collect,
    Compute,
    Launch,
    Plan,
    Predict,
    Prediction,
    Residual,
    Segment,
    Tap,
)

compile_schedule = compile_for_host  # the form that engine directories hold

__all__ = [
    "Accumulate",
    "AddSum",
    "Collect",
    "Compute",
    "Launch",
    "Plan",
    "Predict",
    "Prediction",
    "Residual",
    "Segment",
    "Tap",
    "check_plan",
    "compile_for_device",
    "compile_for_host",
    "compile_schedule",
    "compile_to_sums",
    "in_form",
]
