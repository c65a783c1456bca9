"""Slow, obvious implementations that the real ones are compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from goc_deploy.blocks import ALL_STREAMS
from goc_deploy.compiler import Accumulate, AddSum, Collect, Compute, Plan, Residual, Segment
from goc_deploy.compiler.values import features_of_units
from goc_deploy.exporters.architectures.dit_model import DiT, modulate, unpatchify
from goc_deploy.samplers import SamplerTable
from goc_deploy.schedule import Schedule
from goc_deploy.spec import ModelSpec
from tests.distances import relative_l2 as relative_l2
from tests.distances import worst_step as worst_step

Feature = Callable[[int, int, np.ndarray], np.ndarray]  # (step, feature, tokens) -> its value
# (step, x, guided model output, variance channels, noise) -> x of the next step
SamplerStep = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
SIGNAL = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))  # alphas_cumprod


def run_schedule(
    schedule: Schedule, x: np.ndarray, feature: Feature, spec: ModelSpec | None = None
) -> list[np.ndarray]:
    """Interpret a schedule over toy units: stream += gate(step, feature) * g, history as lists.

    Where a second set of weights begins, all lists are empty.
    Returns x, the stream of the image, after every step. Other streams are x of the start at every
    step.
    """
    spec = spec or plain_spec(schedule)
    if schedule.level == "residual":
        return _run_residual_schedule(schedule, x, feature, spec)
    histories: list[list[np.ndarray]] = [[] for _ in spec.features]
    outputs, start = [], x
    for step, rows in enumerate(schedule.coefficients):
        if step == schedule.switch:
            histories = [[] for _ in spec.features]
        streams = {"image": x, "text": start, "reference": start}
        for unit, row in enumerate(rows):
            tokens = tokens_read(spec, unit, streams)
            for index, stream in features_of_units(spec)[unit]:
                history = histories[index]
                assert len(row) <= len(history)
                g = (
                    sum(c * h for c, h in zip(row, history, strict=False))
                    if row
                    else feature(step, index, tokens)
                )
                if not row or schedule.history == "used":
                    history.insert(0, g)
                streams[stream] = streams[stream] + gate(step, index) * g
        x = streams["image"]
        outputs.append(x)
    return outputs


def plain_spec(schedule: Schedule) -> ModelSpec:
    """A model of a schedule whose units have a feature of the image each."""
    return ModelSpec(schedule.depth, 8, 2, 16, 2, 2, 4, 10, False, branches=schedule.branches)


def tokens_read(spec: ModelSpec, unit: int, streams: Mapping[str, np.ndarray]) -> np.ndarray:
    """What a toy unit computes its features from."""
    shares = {"image": 1.0, "text": 0.5, "reference": 0.25}
    reads = spec.declared_units[unit].reads
    return sum(share * streams[stream] for stream, share in shares.items() if stream in reads)


def _run_residual_schedule(
    schedule: Schedule, x: np.ndarray, feature: Feature, spec: ModelSpec
) -> list[np.ndarray]:
    """The same for what all units of a step add to x, as one number in one history."""
    history: list[np.ndarray] = []
    outputs, start = [], x
    for step, (row, *_) in enumerate(schedule.coefficients):
        before = x
        if step == schedule.switch:
            history = []
        if row:
            assert len(row) <= len(history)
            x = before + sum(c * h for c, h in zip(row, history, strict=False))
        else:
            streams = {"image": x, "text": start, "reference": start}
            for unit, of_unit in enumerate(features_of_units(spec)):
                tokens = tokens_read(spec, unit, streams)
                for index, stream in of_unit:
                    added = gate(step, index) * feature(step, index, tokens)
                    streams[stream] = streams[stream] + added
            x = streams["image"]
        if not row or schedule.history == "used":
            history.insert(0, x - before)
        outputs.append(x)
    return outputs


def run_plan(
    plan: Plan, x: np.ndarray, feature: Feature, spec: ModelSpec | None = None
) -> list[np.ndarray]:
    """Interpret a plan over toy units.

    Slots start as NaN; a launch reads all its slots before it writes any. What other streams are
    after a step does not matter, because they start anew in the next.
    """
    spec = spec or plain_spec(plan.schedule)
    counts = {stream: plan.slots_of(stream) for stream in ALL_STREAMS}
    sums = {stream: plan.accumulators_of(stream) for stream in ALL_STREAMS}
    sums["image"] = plan.accumulators
    kept = {stream: np.full((count, *x.shape), np.nan) for stream, count in counts.items()}
    added = {stream: np.full((count + 1, *x.shape), np.nan) for stream, count in sums.items()}
    outputs, start = [], x
    by_unit = plan.schedule.level == "unit"
    for step, launches in enumerate(plan.launches):
        streams = {"image": x, "text": start, "reference": start}
        for op in launches:
            if isinstance(op, Residual):
                kept["image"][op.store] = streams["image"] - x
                continue
            stream = getattr(op, "stream", "image")
            accumulators = added[stream]
            if isinstance(op, (Collect, AddSum)):
                place = op.ahead if isinstance(op, Collect) else op.accumulator
                streams[stream] = streams[stream] + accumulators[place]
                accumulators[place] = np.nan
                continue
            if isinstance(op, Accumulate):
                for tap in op.taps:
                    before = 0 if tap.starts else accumulators[tap.accumulator]
                    weight = tap.coefficient * gate(step + tap.ahead, op.feature)
                    accumulators[tap.accumulator] = before + weight * kept[stream][op.slot]
                continue
            if isinstance(op, (Compute, Segment)):
                units = range(spec.units) if isinstance(op, Segment) else [op.unit]
                stores = iter(op.stores)
                for unit in units:
                    tokens = tokens_read(spec, unit, streams)
                    for index, of_feature in features_of_units(spec)[unit]:
                        g, store = feature(step, index, tokens), next(stores)
                        if store is not None:
                            kept[of_feature][store] = g
                        streams[of_feature] = streams[of_feature] + gate(step, index) * g
                assert next(stores, "none left") == "none left"
                continue
            slots = kept[stream]
            slots_before = slots.copy()
            for index, p in enumerate(op.predictions, op.feature):
                whole, *others = p.coefficients
                g = sum(
                    (c * slots_before[s] for c, s in zip(others, p.slots[1:], strict=True)),
                    slots_before[p.slots[0]],
                )
                if p.store is not None:
                    slots[p.store] = g
                g = whole * g
                if op.ahead:
                    before = accumulators[op.ahead] if index else 0
                    accumulators[op.ahead] = before + gate(step + op.ahead, index) * g
                else:
                    weight = gate(step, index) if by_unit else 1
                    streams[stream] = streams[stream] + weight * g
        x = streams["image"]
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
