"""Slow, obvious implementations that the real ones are compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from goc_deploy.compiler import Accumulate, AddSum, Collect, Compute, Plan, Residual, Segment
from goc_deploy.exporters.architectures.dit_model import DiT, modulate, unpatchify
from goc_deploy.samplers import SamplerTable
from goc_deploy.schedule import Schedule
from tests.distances import relative_l2 as relative_l2
from tests.distances import worst_step as worst_step

Feature = Callable[[int, int, np.ndarray], np.ndarray]
# (step, x, guided model output, variance channels, noise) -> x of the next step
SamplerStep = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
SIGNAL = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))  # alphas_cumprod


def run_schedule(schedule: Schedule, x: np.ndarray, feature: Feature) -> list[np.ndarray]:
    """Interpret a schedule over toy units: x += gate(step, unit) * g, history as lists.

    Returns x after every step.
    """
    if schedule.level == "residual":
        return _run_residual_schedule(schedule, x, feature)
    histories: list[list[np.ndarray]] = [[] for _ in range(schedule.units)]
    outputs = []
    for step, rows in enumerate(schedule.coefficients):
        for unit, row in enumerate(rows):
            g = (
                sum(c * h for c, h in zip(row, histories[unit], strict=False))
                if row
                else feature(step, unit, x)
            )
            if not row or schedule.history == "used":
                histories[unit].insert(0, g)
            x = x + gate(step, unit) * g
        outputs.append(x)
    return outputs


def _run_residual_schedule(schedule: Schedule, x: np.ndarray, feature: Feature) -> list[np.ndarray]:
    """The same for what all units of a step add to x, as one number in one history."""
    history: list[np.ndarray] = []
    outputs = []
    for step, (row, *_) in enumerate(schedule.coefficients):
        before = x
        if row:
            x = before + sum(c * h for c, h in zip(row, history, strict=False))
        else:
            for unit in range(schedule.units):
                x = x + gate(step, unit) * feature(step, unit, x)
        if not row or schedule.history == "used":
            history.insert(0, x - before)
        outputs.append(x)
    return outputs


def run_plan(plan: Plan, x: np.ndarray, feature: Feature) -> list[np.ndarray]:
    """Interpret a plan over toy units.

    Slots start as NaN; a launch reads all its slots before it writes any.
    """
    slots = np.full((plan.slots, *x.shape), np.nan)
    accumulators = np.full((plan.accumulators + 1, *x.shape), np.nan)
    outputs = []
    by_unit = plan.schedule.level == "unit"
    for step, launches in enumerate(plan.launches):
        start = x
        for op in launches:
            if isinstance(op, Residual):
                slots[op.store] = x - start
                continue
            if isinstance(op, (Collect, AddSum)):
                place = op.ahead if isinstance(op, Collect) else op.accumulator
                x = x + accumulators[place]
                accumulators[place] = np.nan
                continue
            if isinstance(op, Accumulate):
                for tap in op.taps:
                    before = 0 if tap.starts else accumulators[tap.accumulator]
                    weight = tap.coefficient * gate(step + tap.ahead, op.unit)
                    accumulators[tap.accumulator] = before + weight * slots[op.slot]
                continue
            if isinstance(op, (Compute, Segment)):
                for unit, store in (
                    enumerate(op.stores) if isinstance(op, Segment) else [(op.unit, op.store)]
                ):
                    g = feature(step, unit, x)
                    if store is not None:
                        slots[store] = g
                    x = x + gate(step, unit) * g
                continue
            slots_before = slots.copy()
            for unit, p in enumerate(op.predictions, op.unit):
                whole, *others = p.coefficients
                g = sum(
                    (c * slots_before[s] for c, s in zip(others, p.slots[1:], strict=True)),
                    slots_before[p.slots[0]],
                )
                if p.store is not None:
                    slots[p.store] = g
                g = whole * g
                if op.ahead:
                    before = accumulators[op.ahead] if unit else 0
                    accumulators[op.ahead] = before + gate(step + op.ahead, unit) * g
                else:
                    x = x + (gate(step, unit) if by_unit else 1) * g
        outputs.append(x)
    return outputs


def gate(step: int, unit: int) -> float:
    return 0.3 * np.sin(1 + step + 2 * unit)


def toy_feature(step: int, unit: int, x: np.ndarray) -> np.ndarray:
    return np.cos(x * (1 + 0.1 * unit) + 0.05 * step)


def table_step(table: SamplerTable) -> SamplerStep:
    """A sampler table as its docstring says it."""
    kept: list[torch.Tensor] = []

    def step_of(
        k: int, x: torch.Tensor, m: torch.Tensor, v: torch.Tensor, z: torch.Tensor
    ) -> torch.Tensor:
        after = table.latent[k] * x + table.model[k] * m
        for weight, earlier in zip(table.lag_coefficients[k], reversed(kept), strict=False):
            after = after + weight * earlier
        kept.append(table.estimate[k][0] * x + table.estimate[k][1] * m)
        if table.noise[k]:
            after = (
                after
                + table.noise[k] * (torch.exp(table.spread[k] * v) if table.spread[k] else 1) * z
            )
        return after

    return step_of


def _clean(
    prediction: str, x: torch.Tensor, m: torch.Tensor, alpha: float, sigma: float
) -> torch.Tensor:
    if prediction == "eps":
        return (x - sigma * m) / alpha
    return alpha * x - sigma * m if prediction == "v" else m


def dpm_solver_step(timesteps: Sequence[int], prediction: str) -> SamplerStep:
    """DPM-Solver++ 2M as in algorithm 2 of its paper.

    The last step is of first order and goes to the clean sample.
    """
    alpha, sigma = np.sqrt(SIGNAL[list(timesteps)]), np.sqrt(1 - SIGNAL[list(timesteps)])
    half_log_snr = np.log(alpha / sigma)
    kept: list[torch.Tensor] = []

    def step_of(
        k: int, x: torch.Tensor, m: torch.Tensor, _v: torch.Tensor, _z: torch.Tensor
    ) -> torch.Tensor:
        kept.append(_clean(prediction, x, m, alpha[k], sigma[k]))
        if k == len(timesteps) - 1:
            return kept[k]
        h, target = half_log_snr[k + 1] - half_log_snr[k], kept[k]
        if k:
            r = (half_log_snr[k] - half_log_snr[k - 1]) / h
            target = (1 + 1 / (2 * r)) * kept[k] - 1 / (2 * r) * kept[k - 1]
        return sigma[k + 1] / sigma[k] * x - alpha[k + 1] * np.expm1(-h) * target

    return step_of


def ancestral_step(timesteps: Sequence[int], prediction: str) -> SamplerStep:
    """DDPM on the respaced process.

    The model learned the variance, which is between beta tilde and beta.
    """
    signal = SIGNAL[list(timesteps)]
    before = np.append(
        signal[1:], 1.0
    )  # of the step after this one, which came before in the forward process
    betas = 1 - signal / before

    def step_of(
        k: int, x: torch.Tensor, m: torch.Tensor, v: torch.Tensor, z: torch.Tensor
    ) -> torch.Tensor:
        clean = _clean(prediction, x, m, np.sqrt(signal[k]), np.sqrt(1 - signal[k]))
        of_clean = betas[k] * np.sqrt(before[k]) / (1 - signal[k])
        of_x = (1 - before[k]) * np.sqrt(1 - betas[k]) / (1 - signal[k])
        mean = of_clean * clean + of_x * x
        if k == len(timesteps) - 1:
            return mean
        least, most = np.log(betas[k] * (1 - before[k]) / (1 - signal[k])), np.log(betas[k])
        share = (v + 1) / 2
        return mean + torch.exp(0.5 * (share * most + (1 - share) * least)) * z

    return step_of


@torch.inference_mode()
def eager_trajectory(
    model: DiT,
    schedule: Schedule,
    table: SamplerTable,
    noise: np.ndarray,
    labels: list[int],
    cfg_scale: float,
    cfg_channels: int = 3,
    step_of: SamplerStep | None = None,
) -> np.ndarray:
    """The whole sampler in eager PyTorch with a list per unit for the history.

    ``noise`` is (N, draws, C, H, W); ``step_of`` takes the place of the table's rows, of which the
    timesteps remain.
    """
    step_of = step_of or table_step(table)
    spec, n = model.spec, len(labels)
    x = table.start * torch.from_numpy(noise[:, 0])
    rows = torch.tensor([*labels, *[spec.choices] * n])
    histories: list[list[torch.Tensor]] = [[] for _ in range(spec.units)]
    outputs = []
    for step, t in enumerate(table.timesteps):
        condition = model.t_embedder(torch.full((2 * n,), float(t))) + model.y_embedder(rows)
        h = model.x_embedder(torch.cat([x, x])) + model.pos_embed
        for unit in range(spec.units):
            block = model.blocks[unit // 2]
            shift, scale, unit_gate = block.adaLN_modulation(condition).chunk(6, dim=1)[
                3 * (unit % 2) : 3 * (unit % 2) + 3
            ]
            row = schedule.coefficients[step][unit]
            if row:
                g = sum(c * old for c, old in zip(row, histories[unit], strict=False))
            else:
                g = (block.mlp if unit % 2 else block.attn)(modulate(h, shift, scale))
            if not row or schedule.history == "used":
                histories[unit].insert(0, g)
            h = h + unit_gate.unsqueeze(1) * g
        shift, scale = model.final_layer.adaLN_modulation(condition).chunk(2, dim=1)
        output = unpatchify(model.final_layer.linear(modulate(h, shift, scale)), spec)
        cond, uncond = output[:, : spec.channels].chunk(2)
        guided = cond.clone()
        guided[:, :cfg_channels] = (uncond + cfg_scale * (cond - uncond))[:, :cfg_channels]
        fresh = torch.from_numpy(noise[:, min(step + 1, noise.shape[1] - 1)])
        x = step_of(step, x, guided, output[:n, spec.channels :], fresh)
        outputs.append(x.numpy())
    return np.stack(outputs)
