"""diffusers' schedulers as sampler tables, read off by feeding them unit vectors.

A scheduler that is linear in the latents and the model outputs shows its weights where every latent and every output is
a direction of its own: coordinate 2k is what it is given as x[k], coordinate 2k + 1 what the model says at step k. What its
steps read then becomes a recurrence with few terms: `_weights` looks for the fewest earlier estimates that make up a step.
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
from goc_deploy.samplers.table import FOLDER_SAMPLER, MAX_REACH

EXACT = 1e-9  # of the recurrence; float64 gives 1e-14
EXTRA_RUNS = (
    0,
    1,
    9,
)  # how often a scheduler runs the model more than it has steps: PNDM with and without Runge-Kutta
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


def probed_table(settings: Mapping[str, Any], steps: int, prediction: str) -> SamplerTable:
    """The table of a scheduler.

    Args:
        settings: of ``scheduler_config.json``, checked by `goc_deploy.exporters.schedulers.check_scheduler`.
        steps: T, times that the model runs.
        prediction: what the model predicts.

    Raises:
        UsageError: the scheduler cannot run the model so often.
        ModelError: diffusers refuses the settings, or the scheduler is no recurrence with few terms.
        EnvironmentUnsupportedError: this version of diffusers does not have the scheduler, or does not work.
    """
    name = settings["_class_name"]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of diffusers about itself
            probe = _Probe(_scheduler(settings, steps), steps)
    except REFUSALS as cause:
        reason = " ".join(str(cause).split())[:200]
        raise ModelError(
            f"diffusers refuses the folder's {name} for {steps} steps: {reason}; name another `sampler`"
        ) from cause
    return _table(probe, name, prediction)


def _scheduler(settings: Mapping[str, Any], steps: int) -> Any:
    """A scheduler that will run the model ``steps`` times."""
    name = settings["_class_name"]
    try:
        import diffusers

        made = getattr(diffusers, name)
    except (ImportError, AttributeError, RuntimeError) as cause:
        raise EnvironmentUnsupportedError(
            f"diffusers has no working {name}: {cause}; update diffusers"
        ) from cause
    known = inspect.signature(made.__init__).parameters
    given = {setting: value for setting, value in settings.items() if setting in known}
    for extra in EXTRA_RUNS:
        scheduler = made(**given)
        if steps > extra:
            scheduler.set_timesteps(steps - extra)
            if len(scheduler.timesteps) == steps:
                return scheduler
    raise UsageError(
        f"the folder's {name} cannot run the model {steps} times; use another number of `steps`"
    )


class _Probe:
    """What a scheduler does with unit vectors.

    Attributes:
        timesteps: [T] what the model is told.
        latents: (T + 1, T + 1) what the model is shown as x[k] of, in order, the noise that sampling starts from and the
            T model outputs; the last row is the finished sample.
        kept: (T, 2) what is kept of (x[k], m[k]), as the model is shown them.
        keeps: whether the scheduler keeps anything.
        noise: (T,) weight of fresh noise.
    """

    def __init__(self, scheduler: Any, steps: int) -> None:
        self.timesteps = tuple(t.item() for t in scheduler.timesteps)
        self.noise = np.zeros(steps)
        self.kept, self.keeps = (
            np.zeros((steps, 2)),
            hasattr(scheduler, "model_outputs") or hasattr(scheduler, "ets"),
        )
        given, said, shown = np.zeros((steps, steps)), np.zeros((steps, steps)), np.ones(steps + 1)
        draws = "DDPM" in type(scheduler).__name__
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)
        for k, t in enumerate(scheduler.timesteps):
            x, m = _unit(2 * k, 2 * steps), _unit(2 * k + 1, 2 * steps)
            if hasattr(scheduler, "scale_model_input"):
                shown[k] = scheduler.scale_model_input(x, t)[0, 0, 0, 2 * k]
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
            given[k], said[k] = after[0, 0, 0, 0::2], after[0, 0, 0, 1::2]
            of_x, of_m = _kept(scheduler, step, x, m)[0, 0, 0, 2 * k : 2 * k + 2].tolist()
            self.kept[k] = of_x / shown[k], of_m
        chained = np.zeros((steps + 1, steps + 1))
        chained[0, 0] = float(getattr(scheduler, "init_noise_sigma", 1.0))
        for k in range(steps):
            read = np.flatnonzero(given[k])
            chained[k + 1] = given[k, read] @ chained[read]
            chained[k + 1, 1:] += said[k]
        self.latents = shown[:, None] * chained
        self.noise *= shown[1:]

    def estimates(self) -> np.ndarray:
        """(T, T + 1) what every step keeps, of the same as ``latents``."""
        found = self.kept[:, :1] * self.latents[:-1]
        found[:, 1:] += np.diag(self.kept[:, 1])
        return found


def _unit(place: int, size: int) -> Tensor:
    vector = torch.zeros(1, 1, 1, size, dtype=torch.float64)
    vector[..., place] = 1
    return vector


def _kept(scheduler: Any, step: Any, x: Tensor, m: Tensor) -> Tensor:
    """What a scheduler keeps of a step, or the estimate of the clean sample where it keeps nothing."""
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
        model.append(float(target[k + 1]))  # nothing else has seen this output
        target[k + 1] = 0
        earlier = estimates[max(0, k - MAX_REACH) : k][::-1] if probe.keeps else estimates[:0]
        found = _weights(target, probe.latents[k], earlier)
        if found is None or np.count_nonzero(found[1:]) > MAX_LAGS:
            raise ModelError(
                f"the folder's {name} reads more than {MAX_LAGS} earlier estimates at step {k}; name another `sampler`"
            )
        latent.append(float(found[0]))
        history.append(found[1:].tolist())
    reach = max(len(row) for row in history)
    return SamplerTable(
        sampler=FOLDER_SAMPLER,
        prediction=prediction,
        timesteps=probe.timesteps,
        latent=tuple(latent),
        model=tuple(model),
        noise=tuple(probe.noise.tolist()),
        spread=(0.0,) * steps,
        estimate=tuple((of_x, of_m) for of_x, of_m in probe.kept.tolist()),
        history=tuple((*row, *[0.0] * (reach - len(row))) for row in history),
        start=_start(float(probe.latents[0, 0])),
    )


def _start(weight: float) -> float:
    return 1.0 if math.isclose(weight, 1, rel_tol=1e-7) else weight


def _weights(target: np.ndarray, latents: np.ndarray, earlier: np.ndarray) -> np.ndarray | None:
    """Weights of ``latents`` and of as few of the newest ``earlier`` vectors as make up ``target``, or None."""
    scale = np.abs(target).max() or 1.0
    for count in range(len(earlier) + 1):
        columns = np.stack([latents, *earlier[:count]], axis=1)
        sizes = np.abs(columns).max(axis=0)
        sizes[sizes == 0] = 1
        found = np.linalg.lstsq(columns / sizes, target, rcond=1e-13)[0]
        if np.abs(columns / sizes @ found - target).max() <= EXACT * scale:
            weights: np.ndarray = np.where(np.abs(found) <= EXACT * scale, 0.0, found) / sizes
            return weights
    return None
