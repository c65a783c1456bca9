"""The samplers of this package that take the same steps as schedulers of diffusers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, Any

from msgspec import Meta, Struct

from goc_deploy.errors import ModelError
from goc_deploy.samplers import SamplerTable, sampler_table
from goc_deploy.samplers.flows import EULER, MAX_SHIFT, SHIFT, UNIPC, SizeShift, shifted
from goc_deploy.samplers.process import EVEN_SIGMAS, TRAIN_STEPS, Process
from goc_deploy.samplers.table import flow_table, size_table
from goc_deploy.strict_json import convert

FLOW_CLASS = "FlowMatchEulerDiscreteScheduler"


def own_table(steps: int, process: Process) -> SamplerTable | None:
    """The table of our sampler that takes the same steps, or None if there is no such sampler."""
    make = {
        FLOW_CLASS: _own_flow,
        "UniPCMultistepScheduler": _own_unipc,
        "DPMSolverMultistepScheduler": _own_dpm_solver,
        "DDIMScheduler": _own_ddim,
        "DDPMScheduler": _own_ddim,
    }.get((process.scheduler or {})["_class_name"])
    return make(steps, process) if make else None


def _has_plainly(process: Process, *unset: str, **values: Any) -> bool:
    """Whether a scheduler sets none of some settings, and no other value of some more."""
    scheduler = process.scheduler or {}
    return not any(scheduler.get(setting) for setting in unset) and all(
        scheduler.get(setting, value) == value for setting, value in values.items()
    )


class _Shifts(Struct):
    """How a flow scheduler shifts the noise levels that a pipeline gives it."""

    use_dynamic_shifting: bool = False
    shift: Annotated[float, Meta(gt=0, le=MAX_SHIFT)] = 1.0
    shift_terminal: Annotated[float, Meta(ge=0, lt=1)] | None = None


def _even_flow(steps: int, process: Process) -> SamplerTable:
    """The table of a pipeline that gives its scheduler even noise levels.

    Raises:
        ModelError: a setting is out of range.
    """
    settings, where = dict(process.scheduler or {}), f"the folder's {FLOW_CLASS}"
    shifts = convert(settings, _Shifts, where, ModelError)
    last = shifts.shift_terminal or 0.0
    if shifts.use_dynamic_shifting:
        size_shift = convert({**settings, "shift_terminal": last}, SizeShift, where, ModelError)
        return size_table(size_shift, steps, process.tokens)
    exponent = math.log(shifts.shift)
    same = SizeShift(base_shift=exponent, max_shift=exponent, shift_terminal=last)
    return replace(size_table(same, steps, process.tokens), size_shift=None)


def _own_flow(steps: int, process: Process) -> SamplerTable | None:
    if (process.scheduler or {}).get(EVEN_SIGMAS):
        return _even_flow(steps, process)
    shift = (process.scheduler or {}).get("shift", 1.0)
    sigmas = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas")
    if not isinstance(shift, int | float) or shift <= 0:
        return None
    plain = _has_plainly(process, *sigmas, "shift_terminal", num_train_timesteps=TRAIN_STEPS)
    return _shifted_flow(steps, shift) if plain else None


def _own_unipc(steps: int, process: Process) -> SamplerTable | None:
    """UniPC as Wan uses it; with diffusion instead of a flow there is none of ours."""
    shift = (process.scheduler or {}).get("flow_shift", 1.0)
    if not isinstance(shift, int | float) or not 0 < shift <= MAX_SHIFT:
        return None
    plain = _has_plainly(
        process,
        *("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "shift_terminal"),
        "disable_corrector",
        solver_order=2,
        solver_type="bh2",
        predict_x0=True,
        lower_order_final=True,
        final_sigmas_type="zero",
        num_train_timesteps=TRAIN_STEPS,
    )
    flow = process.prediction_type == "flow_to_noise" and (process.scheduler or {}).get(
        "use_flow_sigmas"
    )
    return sampler_table(f"{UNIPC}@{SHIFT}{shift}", steps, process) if plain and flow else None


def _trained_alike(process: Process) -> bool:
    """Whether a scheduler reverses a process that `Process.signal` has, without offsets."""
    betas = (process.scheduler or {}).get("beta_schedule", "linear")
    return betas in ("linear", "scaled_linear", "squaredcos_cap_v2") and _has_plainly(
        process, "steps_offset", "rescale_betas_zero_snr", num_train_timesteps=TRAIN_STEPS
    )


def _own_dpm_solver(steps: int, process: Process) -> SamplerTable | None:
    scheduler = process.scheduler or {}
    spacing = scheduler.get("timestep_spacing", "linspace")
    sigmas = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
    plain = _has_plainly(
        process,
        *sigmas,
        "use_flow_sigmas",
        "euler_at_final",
        "lambda_min_clipped",
        final_sigmas_type="zero",
        algorithm_type="dpmsolver++",
        solver_type="midpoint",
        lower_order_final=True,
    )
    if not plain or not _trained_alike(process):
        return None
    if spacing != "trailing" and steps == TRAIN_STEPS:
        return None
    return sampler_table(f"dpm++:{scheduler.get('solver_order', 2)}@{spacing}", steps, process)


def _own_ddim(steps: int, process: Process) -> SamplerTable | None:
    scheduler = process.scheduler or {}
    spacing, stochastic = (
        scheduler.get("timestep_spacing", "leading"),
        scheduler["_class_name"] == "DDPMScheduler",
    )
    # diffusers steps to t - 1000 // T, which is the next timestep of these spacings.
    even = spacing == "leading" or (
        spacing == "trailing" and TRAIN_STEPS % steps == 0 and not stochastic
    )
    plain = _has_plainly(process, set_alpha_to_one=True, variance_type="fixed_small")
    if not even or not plain or not _trained_alike(process):
        return None
    return sampler_table(f"ddim{':1' if stochastic else ''}@{spacing}", steps, process)


def _shifted_flow(steps: int, shift: float) -> SamplerTable:
    """The Euler table of a flow with shifted sigmas.

    diffusers shifts both ends of the sigmas, spaces them evenly, and shifts them again.

    Source: Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis",
    ICML 2024, eq. 23.
    """
    least = shifted(1 / TRAIN_STEPS, shift)
    stride = (1 - least) / max(steps - 1, 1)
    even = [1 - k * stride if k < steps - 1 or steps == 1 else least for k in range(steps)]
    timesteps = [TRAIN_STEPS * shifted(sigma, shift) for sigma in even]
    return flow_table(EULER, timesteps, "flow_to_noise")
