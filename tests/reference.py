"""Slow, obvious implementations that the real ones are compared with."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from goc_deploy.exporters.dit import DiT, modulate, unpatchify
from goc_deploy.plan import Collect, Compute, Plan
from goc_deploy.samplers import SamplerTable
from goc_deploy.schedule import Schedule

Feature = Callable[[int, int, np.ndarray], np.ndarray]


def relative_l2(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def worst_step(found: np.ndarray, expected: np.ndarray) -> float:
    return max(relative_l2(f, e) for f, e in zip(found, expected, strict=True))


def run_schedule(schedule: Schedule, x: np.ndarray, feature: Feature) -> list[np.ndarray]:
    """Interpret a schedule over toy units: x += gate(step, unit) * g, history as lists. Returns x after every step."""
    histories: list[list[np.ndarray]] = [[] for _ in range(schedule.units)]
    outputs = []
    for step, rows in enumerate(schedule.coefficients):
        for unit, row in enumerate(rows):
            g = sum(c * h for c, h in zip(row, histories[unit], strict=False)) if row else feature(step, unit, x)
            if not row or schedule.history == "used":
                histories[unit].insert(0, g)
            x = x + gate(step, unit) * g
        outputs.append(x)
    return outputs


def run_plan(plan: Plan, x: np.ndarray, feature: Feature) -> list[np.ndarray]:
    """Interpret a plan over toy units. Slots start as NaN; a launch reads all its slots before it writes any."""
    slots = np.full((plan.slots, *x.shape), np.nan)
    accumulators = np.full((plan.accumulators + 1, *x.shape), np.nan)
    outputs = []
    for step, launches in enumerate(plan.launches):
        for op in launches:
            if isinstance(op, Collect):
                x = x + accumulators[op.ahead]
                accumulators[op.ahead] = np.nan
                continue
            if isinstance(op, Compute):
                g = feature(step, op.unit, x)
                if op.store is not None:
                    slots[op.store] = g
                x = x + gate(step, op.unit) * g
                continue
            slots_before = slots.copy()
            for unit, p in enumerate(op.predictions, op.unit):
                whole, *others = p.coefficients
                g = sum(
                    (c * slots_before[s] for c, s in zip(others, p.slots[1:], strict=True)), slots_before[p.slots[0]]
                )
                if p.store is not None:
                    slots[p.store] = g
                g = whole * g
                if op.ahead:
                    before = accumulators[op.ahead] if unit else 0
                    accumulators[op.ahead] = before + gate(step + op.ahead, unit) * g
                else:
                    x = x + gate(step, unit) * g
        outputs.append(x)
    return outputs


def gate(step: int, unit: int) -> float:
    return 0.3 * np.sin(1 + step + 2 * unit)


def toy_feature(step: int, unit: int, x: np.ndarray) -> np.ndarray:
    return np.cos(x * (1 + 0.1 * unit) + 0.05 * step)


@torch.inference_mode()
def eager_trajectory(
    model: DiT,
    schedule: Schedule,
    table: SamplerTable,
    noise: np.ndarray,
    labels: list[int],
    cfg_scale: float,
    cfg_channels: int = 3,
) -> np.ndarray:
    """The whole sampler in eager PyTorch with a list per unit for the history. ``noise`` is (N, draws, C, H, W)."""
    spec, n = model.spec, len(labels)
    x = torch.from_numpy(noise[:, 0])
    rows = torch.tensor([*labels, *[spec.classes] * n])
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
        eps = unpatchify(model.final_layer.linear(modulate(h, shift, scale)), spec)[:, : spec.channels]
        cond, uncond = eps.chunk(2)
        guided = cond.clone()
        guided[:, :cfg_channels] = (uncond + cfg_scale * (cond - uncond))[:, :cfg_channels]
        x = table.latent[step] * x + table.model[step] * guided
        if table.noise[step]:
            x = x + table.noise[step] * torch.from_numpy(noise[:, step + 1])
        outputs.append(x.numpy())
    return np.stack(outputs)
