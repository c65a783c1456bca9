"""What the training scripts of this example share: the data, the loss, the optimizer, the loop."""

from __future__ import annotations

import argparse
import copy
import csv
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from goc_deploy.exporters.architectures.dit_diffusers import position_table

HERE = Path(__file__).resolve().parent
TRAIN_TIMESTEPS = 1000
BETA_START, BETA_END = 1e-4, 0.02
SNR_CAP = 5.0
CONDITION_DROPOUT = 0.1
WARMUP_STEPS = 100
GRADIENT_NORM = 1.0
MOMENTUM = 0.95
# Layers that make shifts and scales.
MODULATION = ("adaLN_modulation", ".norm1.", ".norm1_context.")
ORTHOGONAL_STEPS = 5
ORTHOGONAL_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def initialise(model: nn.Module, zero: Callable[[str], bool]) -> None:
    """Set the weights that a run starts from.

    Args:
        model: a DiT or a PixArt.
        zero: whether the linear layer of that name starts at zero.
    """
    linears = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    for linear in linears.values():
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
    patches = model.x_embedder.proj
    nn.init.xavier_uniform_(patches.weight.data.flatten(1))
    if patches.bias is not None:
        nn.init.zeros_(patches.bias)
    for name, linear in linears.items():
        if name.startswith("t_embedder."):
            nn.init.normal_(linear.weight, std=0.02)
        elif zero(name):
            nn.init.zeros_(linear.weight)
    model.pos_embed.data.copy_(position_table(model.spec))


def load_digits(path: Path) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 28, 28) float32 in [-1, 1] and labels (N,) int64."""
    with np.load(path) as data:
        images = torch.from_numpy(data["images"]).float()[:, None] / 127.5 - 1
        labels = torch.from_numpy(data["labels"]).long()
    return images, labels


def signal_levels() -> Tensor:
    """Cumulative products of 1 - beta for the linear schedule, (1000,) float32."""
    betas = torch.linspace(BETA_START, BETA_END, TRAIN_TIMESTEPS, dtype=torch.float64)
    return torch.cumprod(1 - betas, dim=0).float()


def spread_timesteps(batch: int) -> Tensor:
    """One random timestep from each of ``batch`` equal parts of the range.

    This makes the loss less noisy.
    """
    places = (torch.arange(batch) + torch.rand(batch)) / batch
    return (places * TRAIN_TIMESTEPS).long().clamp(max=TRAIN_TIMESTEPS - 1)


def noise_losses(
    predict: Callable[[Tensor, Tensor, Tensor], Tensor],
    null_condition: int,
    images: Tensor,
    conditions: Tensor,
    alphas: Tensor,
) -> tuple[Tensor, Tensor]:
    """Weighted loss to minimise and plain mean squared error of the predicted noise, for one batch.

    The weight min(SNR, 5) / SNR holds back the nearly clean timesteps, whose noise no small model
    can predict.
    """
    t = spread_timesteps(len(images))
    alpha = alphas[t]
    noise = torch.randn_like(images)
    noisy = (
        alpha.sqrt()[:, None, None, None] * images + (1 - alpha).sqrt()[:, None, None, None] * noise
    )
    dropped = torch.rand(len(conditions)) < CONDITION_DROPOUT
    conditions = torch.where(dropped, torch.full_like(conditions, null_condition), conditions)
    errors: Tensor = (predict(noisy, t.float(), conditions) - noise).square().mean(dim=(1, 2, 3))
    snr = alpha / (1 - alpha)
    return (errors * snr.clamp(max=SNR_CAP) / snr).mean(), errors.mean().detach()


def flow_batch(clean: Tensor, shift: float) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy samples of a flow, their timesteps (N,), and the velocities that a model learns.

    Args:
        clean: samples (N, ...).
        shift: larger numbers make more of the batch noisy.
    """
    even = (torch.arange(len(clean)) + torch.rand(len(clean))) / len(clean)
    sigma = shift * even / (1 + (shift - 1) * even)
    noise = torch.randn_like(clean)
    weight = sigma.reshape(-1, *(1,) * (clean.ndim - 1))
    return (1 - weight) * clean + weight * noise, TRAIN_TIMESTEPS * sigma, noise - clean


def orthogonal(matrix: Tensor) -> Tensor:
    """Roughly the orthogonal factor of a matrix.

    A quintic iteration drives its singular values towards 1.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    a, b, c = ORTHOGONAL_COEFFICIENTS
    for _ in range(ORTHOGONAL_STEPS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class Optimizer:
    """Muon for the matrices of the blocks' branches, AdamW for everything else.

    Muon (Jordan et al., 2024) steps along the orthogonal factor of the momentum; in short trials
    the loss of these models fell faster with it than with AdamW alone.

    Args:
        model: its parameters that need gradients are updated.
        adam_rate: learning rate of AdamW.
        muon_rate: learning rate of Muon.
        bf16: orthogonalise in bfloat16, which such a rough iteration tolerates.
    """

    def __init__(
        self, model: nn.Module, adam_rate: float, muon_rate: float, bf16: bool = False
    ) -> None:
        self.rates = adam_rate, muon_rate
        self.dtype = torch.bfloat16 if bf16 else torch.float32
        branches = {
            name: parameter
            for name, parameter in model.named_parameters()
            if "blocks." in name
            and name.endswith(".weight")
            and parameter.ndim == 2
            and not any(layer in name for layer in MODULATION)
        }
        self.matrices = list(branches.values())
        self.momenta = [torch.zeros_like(matrix) for matrix in self.matrices]
        others = [
            p for name, p in model.named_parameters() if p.requires_grad and name not in branches
        ]
        self.adam = torch.optim.AdamW(others, weight_decay=0.0, betas=(0.9, 0.99), fused=True)

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """Update the weights from their gradients, with both learning rates times ``factor``."""
        adam_rate, muon_rate = self.rates
        self.adam.param_groups[0]["lr"] = adam_rate * factor
        self.adam.step()
        for matrix, momentum in zip(self.matrices, self.momenta, strict=True):
            assert matrix.grad is not None
            momentum.lerp_(matrix.grad, 1 - MOMENTUM)
            direction = orthogonal(matrix.grad.lerp(momentum, MOMENTUM).to(self.dtype))
            shape_factor = max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
            matrix.add_(direction, alpha=-muon_rate * factor * shape_factor)


def rate_factor(step: int, progress: float) -> float:
    """Linear warm-up over the first steps, times half a cosine over the run.

    ``progress`` is 0..1.
    """
    return min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def update_average(average: nn.Module, model: nn.Module, step: int, decay: float) -> None:
    """Move the averaged weights towards the model's, faster in the first steps."""
    rate = 1 - min(decay, (1 + step) / (10 + step))
    with torch.no_grad():
        for mean, value in zip(average.parameters(), model.parameters(), strict=True):
            mean.lerp_(value, rate)


def save(state: Mapping[str, Tensor], path: Path) -> None:
    """Write a plain state dict in float16; readers see the old file or the whole new one."""
    temporary = path.with_name(path.name + ".tmp")
    torch.save({name: tensor.half() for name, tensor in state.items()}, temporary)
    os.replace(temporary, path)


def training_parser(description: str, out: str, minutes: float) -> argparse.ArgumentParser:
    """The options that every script takes."""
    parser = argparse.ArgumentParser(description=description)
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--minutes", type=float, default=minutes, help="train for this long (default %(default)s)"
    )
    length.add_argument("--steps", type=int, help="train for this many steps instead; repeatable")
    parser.add_argument("--data", type=Path, default=HERE / "mnist10k.npz")
    parser.add_argument(
        "--out", type=Path, default=HERE / out, help="what to write (default %(default)s)"
    )
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--log-every", type=int, default=100, help="steps per line of the loss log")
    return parser


def add_denoiser_options(parser: argparse.ArgumentParser) -> None:
    """The options of the scripts that train a Diffusion Transformer."""
    parser.add_argument("--adam-rate", type=float, default=3e-3, help="peak learning rate of AdamW")
    parser.add_argument("--muon-rate", type=float, default=0.02, help="peak learning rate of Muon")
    parser.add_argument("--ema", type=float, default=0.999, help="decay of the averaged weights")


def batches(count: int, size: int) -> Iterable[Tensor]:
    """Indices of random batches without end, every example once per pass."""
    while True:
        order = torch.randperm(count)
        for first in range(0, count - size + 1, size):
            yield order[first : first + size]


def run_steps(
    args: argparse.Namespace, step_losses: Callable[[int, float], Mapping[str, float]]
) -> int:
    """Take steps until the time or the number in the arguments is used up, and log the losses.

    Args:
        args: of `training_parser`; the log goes beside ``out`` with suffix ``.csv``.
        step_losses: takes (step, factor of the learning rate), updates the model and returns its
            losses by name.

    Returns:
        How many steps were taken.
    """
    start = time.monotonic()
    step, window, log = 0, [], None
    with args.out.with_suffix(".csv").open("w", newline="") as stream:
        while True:
            minutes = (time.monotonic() - start) / 60
            progress = step / args.steps if args.steps else minutes / args.minutes
            factor = rate_factor(step, progress)
            if window and (len(window) == args.log_every or progress >= 1):
                means = {
                    name: f"{np.mean([losses[name] for losses in window]):.5f}"
                    for name in window[0]
                }
                row: dict[str, Any] = {
                    "step": step,
                    "seconds": f"{minutes * 60:.0f}",
                    "rate_factor": f"{factor:.4f}",
                    **means,
                }
                if log is None:
                    log = csv.DictWriter(stream, list(row), lineterminator="\n")
                    log.writeheader()
                log.writerow(row)
                stream.flush()
                shown = ", ".join(f"{name} {value}" for name, value in means.items())
                print(f"step {step}, {minutes:.1f} min, {shown}", flush=True)
                window.clear()
            if progress >= 1:
                return step
            window.append(dict(step_losses(step, factor)))
            step += 1


def train_denoiser(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    args: argparse.Namespace,
    conditions: Callable[[Tensor], Tensor] = lambda labels: labels,
) -> nn.Module:
    """Train a model to predict noise.

    Args:
        model: takes noisy images, timesteps and conditions; its ``null_condition`` stands for no
            condition.
        images: (N, C, H, W) float32 of variance about one.
        labels: (N,) int64.
        args: of `training_parser` with `add_denoiser_options`.
        conditions: makes the conditions of a batch from its labels.

    Returns:
        The model with averaged weights.
    """
    print(
        f"{type(model).__name__} {model.spec}, {sum(p.numel() for p in model.parameters())} "
        "parameters",
        flush=True,
    )
    alphas, average = signal_levels(), copy.deepcopy(model)
    optimizer = Optimizer(model, args.adam_rate, args.muon_rate)
    order = iter(batches(len(images), args.batch))

    def step_losses(step: int, factor: float) -> dict[str, float]:
        chosen = next(order)
        loss, mse = noise_losses(
            model, model.null_condition, images[chosen], conditions(labels[chosen]), alphas
        )
        model.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_NORM)
        optimizer.step(factor)
        update_average(average, model, step, args.ema)
        return {"weighted_loss": loss.item(), "mse": mse.item()}

    print(f"{run_steps(args, step_losses)} steps: {args.out}")
    return average
