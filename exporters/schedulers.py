"""The diffusers scheduler of a model's folder as a sampler table.

If diffusers is installed, the table is measured by running its scheduler. If a sampler of this
package takes the same steps, it replaces diffusers when that is not installed, and is compared with
the measured table when it is.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Annotated, Any

from msgspec import Meta, Struct

from goc_deploy.errors import EnvironmentUnsupportedError, ModelError, UsageError, VerificationError
from goc_deploy.exporters.own_schedulers import FLOW_CLASS, own_table
from goc_deploy.samplers import SamplerTable, sampler_table
from goc_deploy.samplers.process import EVEN_SIGMAS, TRAIN_STEPS, Process
from goc_deploy.samplers.sampler_spec import FOLDER_SAMPLER
from goc_deploy.samplers.solvers import check_steps
from goc_deploy.strict_json import convert

INSTEAD = "name another `sampler`"
PREDICTION_TYPES = {
    "epsilon": "eps",
    "v_prediction": "v",
    "sample": "x0",
    "flow_prediction": "flow_to_noise",
}
MAX_TRAIN_STEPS = 10**5
TOLERANCE = 1e-3  # diffusers computes its betas in float32


@dataclass(frozen=True, slots=True)
class _Allowed:
    """Settings under which a class of schedulers can be expressed as a table.

    Such a scheduler is linear and draws no noise other than that of the table.

    Attributes:
        values: setting -> the supported values; the first is the default of diffusers, unless
            ``missing`` has the setting.
        missing: setting -> the default of diffusers, if it is not supported.
    """

    values: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    missing: Mapping[str, Any] = field(default_factory=dict)


_LINEAR = {"thresholding": (False, None)}
_STATIC = {**_LINEAR, "use_dynamic_shifting": (False, None)}
_UNCLIPPED = {**_LINEAR, "clip_sample": (False, None)}
FIXED_VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log")
SCHEDULERS = {
    "DDIMScheduler": _Allowed(_UNCLIPPED, {"clip_sample": True}),
    "DDPMScheduler": _Allowed(
        {**_UNCLIPPED, "variance_type": FIXED_VARIANCES}, {"clip_sample": True}
    ),
    "PNDMScheduler": _Allowed(),
    "DPMSolverMultistepScheduler": _Allowed(
        {**_STATIC, "algorithm_type": ("dpmsolver++", "dpmsolver"), "variance_type": (None,)}
    ),
    "DEISMultistepScheduler": _Allowed(_STATIC),
    "UniPCMultistepScheduler": _Allowed({**_STATIC, "solver_p": (None,)}),
    "EulerDiscreteScheduler": _Allowed(),
    FLOW_CLASS: _Allowed(
        {"use_dynamic_shifting": (False, None), "stochastic_sampling": (False, None)}
    ),
}
# Of pipelines that compute a shift for the size, see `goc_deploy.samplers.process.EVEN_SIGMAS`.
_OF_SIZE = _Allowed(
    {
        "stochastic_sampling": (False, None),
        "time_shift_type": ("exponential",),
        "use_karras_sigmas": (False, None),
        "use_exponential_sigmas": (False, None),
        "use_beta_sigmas": (False, None),
        "invert_sigmas": (False, None),
        "num_train_timesteps": (TRAIN_STEPS,),
    }
)


class _Numbers(Struct):
    """Settings that are counts, with defaults that are in range."""

    num_train_timesteps: Annotated[int, Meta(ge=1, le=MAX_TRAIN_STEPS)] = 1
    solver_order: Annotated[int, Meta(ge=1, le=3)] = 1


_List = Annotated[tuple[int | float | str, ...], Meta(max_length=MAX_TRAIN_STEPS)]
_Value = bool | int | float | str | _List | None  # the value of any setting


def prediction_of(scheduler: Mapping[str, Any], where: str) -> str:
    """The prediction type of a model by its scheduler, one of `goc_deploy.spec.PREDICTION_TYPES`.

    Raises:
        ModelError: the prediction type is unknown.
    """
    told = scheduler.get("prediction_type", "epsilon")
    if scheduler.get("_class_name") == FLOW_CLASS:
        return "flow_to_noise"
    if not isinstance(told, str) or told not in PREDICTION_TYPES:
        raise ModelError(
            f"{where}: prediction_type is {told!r}, only {', '.join(PREDICTION_TYPES)} are "
            "supported; if it is one of them, give `prediction`"
        )
    return PREDICTION_TYPES[told]


def check_scheduler(scheduler: Mapping[str, Any]) -> None:
    """Check that a scheduler can be a table: known, linear, and without noise of its own.

    Raises:
        ModelError: it cannot; the message names the scheduler or the setting, and the option that
            overrides it.
    """
    name = scheduler.get("_class_name")
    if not isinstance(name, str) or name not in SCHEDULERS:
        raise ModelError(
            f"the folder's scheduler is {name!r}, which is not one of {', '.join(SCHEDULERS)}; "
            f"{INSTEAD}"
        )
    sized = name == FLOW_CLASS and scheduler.get(EVEN_SIGMAS)
    allowed = _OF_SIZE if sized else SCHEDULERS[name]
    for setting, values in allowed.values.items():
        actual = scheduler.get(setting, allowed.missing.get(setting, values[0]))
        if not any(type(actual) is type(value) and actual == value for value in values):
            shown = " or ".join(
                repr(value) for value in values if value is not None or len(values) == 1
            )
            raise ModelError(
                f"the folder's {name} has {setting} {actual!r}, only {shown} is supported; "
                f"{INSTEAD}"
            )
    where = f"the folder's {name}"
    try:
        for setting, value in scheduler.items():
            convert(value, _Value, where, ModelError, f"$.{setting}")
        convert(dict(scheduler), _Numbers, where, ModelError)
    except ModelError as cause:
        raise ModelError(f"{cause}; {INSTEAD}") from cause


def table_from_sampler(sampler: str, steps: int, process: Process) -> SamplerTable:
    """The table of any sampler, including the scheduler of the model's folder.

    Args:
        sampler: a sampler of `goc_deploy.samplers.sampler_table`, or ``diffusers`` for the
            scheduler of the folder.
        steps: T, the number of model runs.
        process: prediction type of the model, its training process, and the scheduler of its
            folder.

    Raises:
        UsageError: the sampler is unknown, or a number is out of range.
        ModelError, EnvironmentUnsupportedError, VerificationError: as in `scheduler_table`.
    """
    return (
        scheduler_table(steps, process)
        if sampler == FOLDER_SAMPLER
        else sampler_table(sampler, steps, process)
    )


def scheduler_table(steps: int, process: Process) -> SamplerTable:
    """The table of the scheduler of a model's folder.

    Args:
        steps: T, the number of model runs. A scheduler with more model runs than steps (PNDM) gets
            fewer steps.
        process: the process, with a scheduler.

    Raises:
        UsageError: the model has no scheduler, or the scheduler cannot take T steps.
        ModelError: the scheduler cannot be a table.
        EnvironmentUnsupportedError: no sampler of this package takes the same steps, and diffusers
            is not installed.
        VerificationError: the measured table differs from that of our equivalent sampler.
    """
    scheduler = process.scheduler
    if scheduler is None:
        raise UsageError(
            f"sampler {FOLDER_SAMPLER!r} is the scheduler of a pipeline's folder, which did not "
            f"come with this model; {INSTEAD}"
        )
    check_scheduler(scheduler)
    check_steps(steps, scheduler.get("num_train_timesteps", TRAIN_STEPS))
    own = own_table(steps, process)
    if find_spec("diffusers") is None or find_spec("torch") is None:
        if own is None:
            raise EnvironmentUnsupportedError(
                f"the folder's {scheduler['_class_name']} with these settings is read with "
                "diffusers and torch, which are not installed; "
                f"run: pip install 'goc_deploy[export,diffusers]', or {INSTEAD}"
            )
        return replace(own, sampler=FOLDER_SAMPLER)
    from goc_deploy.exporters.scheduler_probe import probed_table

    size_shift = None if own is None else own.size_shift
    exponent = None if size_shift is None else size_shift.exponent(process.tokens, steps)
    probed = probed_table(scheduler, steps, process.prediction_type, exponent)
    if own is not None and not _same_steps(own, probed):
        raise VerificationError(
            f"the folder's {scheduler['_class_name']} in this version of diffusers takes other "
            f"steps than sampler {own.sampler!r}, which it "
            f"should equal; {INSTEAD} to decide"
        )
    return replace(probed, size_shift=size_shift)


def _same_steps(one: SamplerTable, other: SamplerTable) -> bool:
    """Whether two tables have the same timesteps and the same latents after every step."""
    if (
        max(abs(a - b) for a, b in zip(one.timesteps, other.timesteps, strict=True))
        > TOLERANCE * TRAIN_STEPS
    ):
        return False
    ends = [_followed(table) for table in (one, other)]
    return all(abs(a - b) <= TOLERANCE * max(1.0, abs(a)) for a, b in zip(*ends, strict=True))


def _followed(table: SamplerTable) -> list[float]:
    """The latent of one element after every step, with model outputs and noise of a fixed seed."""
    generator, kept = random.Random(0), [0.0] * table.reach
    x, path = table.start * generator.uniform(-1, 1), []
    for k in range(table.steps):
        m, z = generator.uniform(-1, 1), generator.uniform(-1, 1)
        after = table.latent[k] * x + table.model[k] * m + table.noise[k] * z
        after += sum(
            weight * earlier
            for weight, earlier in zip(table.lag_coefficients[k], kept, strict=True)
        )
        kept = [table.estimate[k][0] * x + table.estimate[k][1] * m, *kept][: table.reach]
        x = after
        path.append(x)
    return path
