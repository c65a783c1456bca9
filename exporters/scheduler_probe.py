"""The schedulers of diffusers as sampler tables, measured by running them on unit vectors.

A scheduler that is linear in the latents and the model outputs reveals its weights if every latent
and every model output is a separate direction: coordinate 2k is the latent x[k], and coordinate
2k + 1 is the model output of step k. The steps then become a recurrence with few terms: `_weights`
finds the smallest number of earlier estimates that explain a step.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from goc_deploy.errors import EnvironmentUnsupportedError, ModelError, UsageError
from goc_deploy.samplers import MAX_LAGS, SamplerTable
from goc_deploy.samplers.process import EVEN_SIGMAS
from goc_deploy.samplers.sampler_spec import FOLDER_SAMPLER
from goc_deploy.samplers.table import MAX_REACH

EXACT = 1e-9  # allowed relative error of the recurrence; float64 reaches 1e-14
# Model runs beyond the number of steps: 1 or 9 for PNDM, without and with Runge-Kutta.
EXTRA_RUNS = (0, 1, 9)
SEED = 0
REFUSALS = (
    ArithmeticError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


def probed_table(
    settings: Mapping[str, Any], steps: int, prediction: str, exponent: float | None = None
) -> SamplerTable:
    """Measure the table of a scheduler.

    Args:
        settings: settings of ``scheduler_config.json``, checked by
            `goc_deploy.exporters.schedulers.check_scheduler`.
        steps: T, the number of model runs.
        prediction: prediction type of the model.
        exponent: logarithm of the shift, if it depends on the size of an image.

    Raises:
        UsageError: the scheduler cannot run the model T times.
        ModelError: diffusers refuses the settings, or the scheduler is not a recurrence with few
            terms.
        EnvironmentUnsupportedError: the installed diffusers does not have the scheduler, or does
            not work.
    """
    name = settings["_class_name"]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations inside diffusers
            probe = _Probe(_scheduler(settings, steps, exponent), steps)
    except REFUSALS as cause:
        reason = " ".join(str(cause).split())[:200]
        raise ModelError(
            f"diffusers refuses the folder's {name} for {steps} steps: {reason}; "
            "name another `sampler`"
        ) from cause
    return _table(probe, name, prediction)


def _scheduler(settings: Mapping[str, Any], steps: int, exponent: float | None) -> Any:
    """A scheduler that runs the model ``steps`` times."""
    name = settings["_class_name"]
    try:
        import diffusers

        scheduler_class = getattr(diffusers, name)
    except (ImportError, AttributeError, RuntimeError) as cause:
        raise EnvironmentUnsupportedError(
            f"diffusers has no working {name}: {cause}; update diffusers"
        ) from cause
    parameters = inspect.signature(scheduler_class.__init__).parameters
    arguments = {setting: value for setting, value in settings.items() if setting in parameters}
    if (
        settings.get(EVEN_SIGMAS)
        and "sigmas" in inspect.signature(scheduler_class.set_timesteps).parameters
    ):
        scheduler = scheduler_class(**arguments)
        even = np.linspace(1.0, 1 / steps, steps)
        scheduler.set_timesteps(sigmas=even, **({} if exponent is None else {"mu": exponent}))
        return scheduler
    for extra in EXTRA_RUNS:
        scheduler = scheduler_class(**arguments)
        if steps > extra:
            scheduler.set_timesteps(steps - extra)
            if len(scheduler.timesteps) == steps:
                return scheduler
    raise UsageError(
        f"the folder's {name} cannot run the model {steps} times; use another number of `steps`"
    )


class _Probe:
    """The weights of a scheduler, from a run on unit vectors.

    Attributes:
        timesteps: T timesteps that the model gets.
        latents: (T + 1, T + 1) float64. Row k has the weights of the model's input x[k]: of the
            initial noise, then of the T model outputs. The last row is the finished sample.
        kept: (T, 2) float64, weights of the model's input x[k] and its output m[k] in what the
            scheduler stores.
        keeps: whether the scheduler stores anything.
        noise: (T,) float64, weights of fresh noise.
    """

    def __init__(self, scheduler: Any, steps: int) -> None:
        self.timesteps = tuple(t.item() for t in scheduler.timesteps)
        self.noise = np.zeros(steps)
        self.kept, self.keeps = (
            np.zeros((steps, 2)),
            hasattr(scheduler, "model_outputs") or hasattr(scheduler, "ets"),
        )
        of_latents, of_outputs = np.zeros((steps, steps)), np.zeros((steps, steps))
        input_scale = np.ones(steps + 1)
        draws = "DDPM" in type(scheduler).__name__
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)
        for k, t in enumerate(scheduler.timesteps):
            x, m = _unit(2 * k, 2 * steps), _unit(2 * k + 1, 2 * steps)
            if hasattr(scheduler, "scale_model_input"):
                input_scale[k] = scheduler.scale_model_input(x, t)[0, 0, 0, 2 * k]
            fixed = {"generator": torch.Generator().manual_seed(SEED)} if draws else {}
            step = scheduler.step(m, t, x, **fixed)
            after = step.prev_sample.double()
            if draws:
                zeros, fixed = (
                    torch.zeros_like(x),
                    {"generator": torch.Generator().manual_seed(SEED)},
                )
                alone = scheduler.step(zeros, t, zeros, **fixed).prev_sample.double()
                drawn = torch.randn(
                    x.shape, generator=torch.Generator().manual_seed(SEED), dtype=x.dtype
                )
                self.noise[k], after = float(alone[0, 0, 0, 0] / drawn[0, 0, 0, 0]), after - alone
            of_latents[k], of_outputs[k] = after[0, 0, 0, 0::2], after[0, 0, 0, 1::2]
            of_x, of_m = _kept(scheduler, step, x, m)[0, 0, 0, 2 * k : 2 * k + 2].tolist()
            self.kept[k] = of_x / input_scale[k], of_m
        chained = np.zeros((steps + 1, steps + 1))
        chained[0, 0] = float(getattr(scheduler, "init_noise_sigma", 1.0))
        for k in range(steps):
            read = np.flatnonzero(of_latents[k])
            chained[k + 1] = of_latents[k, read] @ chained[read]
            chained[k + 1, 1:] += of_outputs[k]
        self.latents = input_scale[:, None] * chained
        self.noise *= input_scale[1:]

    def estimates(self) -> np.ndarray:
        """(T, T + 1) float64: weights of the stored estimates, in the columns of ``latents``."""
        estimates = self.kept[:, :1] * self.latents[:-1]
        estimates[:, 1:] += np.diag(self.kept[:, 1])
        return estimates


def _unit(place: int, size: int) -> Tensor:
    vector = torch.zeros(1, 1, 1, size, dtype=torch.float64)
    vector[..., place] = 1
    return vector


def _kept(scheduler: Any, step: Any, x: Tensor, m: Tensor) -> Tensor:
    """What a scheduler stores at a step; if it stores nothing, its estimate of the clean sample."""
    if hasattr(scheduler, "model_outputs"):
        kept: Tensor = scheduler.model_outputs[-1]
        return kept.double()
    if hasattr(scheduler, "ets"):
        return m
    clean = getattr(step, "pred_original_sample", None)
    if clean is not None:
        return clean.double() if isinstance(clean, Tensor) else m
    return x - scheduler.sigmas[scheduler.step_index - 1].double() * m


def _table(probe: _Probe, name: str, prediction: str) -> SamplerTable:
    """The probed steps as a recurrence."""
    steps, estimates = len(probe.timesteps), probe.estimates()
    latent, model, history = [], [], []
    for k in range(steps):
        target = probe.latents[k + 1].copy()
        model.append(float(target[k + 1]))  # no earlier estimate contains this output
        target[k + 1] = 0
        earlier = estimates[max(0, k - MAX_REACH) : k][::-1] if probe.keeps else estimates[:0]
        weights = _weights(target, probe.latents[k], earlier)
        if weights is None or np.count_nonzero(weights[1:]) > MAX_LAGS:
            raise ModelError(
                f"the folder's {name} reads more than {MAX_LAGS} earlier estimates at "
                f"step {k}; name another `sampler`"
            )
        latent.append(float(weights[0]))
        history.append(weights[1:].tolist())
    reach = max(len(row) for row in history)
    return SamplerTable(
        sampler=FOLDER_SAMPLER,
        prediction_type=prediction,
        timesteps=probe.timesteps,
        latent=tuple(latent),
        model=tuple(model),
        noise=tuple(probe.noise.tolist()),
        spread=(0.0,) * steps,
        estimate=tuple((of_x, of_m) for of_x, of_m in probe.kept.tolist()),
        lag_coefficients=tuple((*row, *[0.0] * (reach - len(row))) for row in history),
        start=_start(float(probe.latents[0, 0])),
    )


def _start(weight: float) -> float:
    return 1.0 if math.isclose(weight, 1, rel_tol=1e-7) else weight


def _weights(target: np.ndarray, latents: np.ndarray, earlier: np.ndarray) -> np.ndarray | None:
    """Weights of ``latents`` and of the newest ``earlier`` vectors that sum up to ``target``.

    Returns:
        (1 + n,) float64 for the smallest possible n, or None if there are no such weights.
    """
    scale = np.abs(target).max() or 1.0
    for count in range(len(earlier) + 1):
        columns = np.stack([latents, *earlier[:count]], axis=1)
        sizes = np.abs(columns).max(axis=0)
        sizes[sizes == 0] = 1
        scaled = np.linalg.lstsq(columns / sizes, target, rcond=1e-13)[0]
        if np.abs(columns / sizes @ scaled - target).max() <= EXACT * scale:
            weights: np.ndarray = np.where(np.abs(scaled) <= EXACT * scale, 0.0, scaled) / sizes
            return weights
    return None
