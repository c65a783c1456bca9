"""Training that goes on from a checkpoint, for as many sessions as it takes."""

from __future__ import annotations

import argparse
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from training import GRADIENT_NORM, WARMUP_STEPS, Optimizer, update_average


class Resumable(Protocol):
    """A training: a model, the average of its weights, its optimizer, and the steps it took.

    Attributes:
        args: with ``batch``, ``decay_steps``, ``ema``, ``folder``, ``log_every`` and
            ``save_minutes``.
    """

    args: argparse.Namespace
    model: nn.Module
    average: nn.Module
    optimizer: Optimizer
    step: int

    def take_step(self, factor: float) -> float:
        """One update at this factor of the learning rates; returns the loss."""

    def save(self) -> None:
        """Write the checkpoint, and the weights for goc-export."""


def descend(training: Resumable, loss: Tensor, factor: float) -> float:
    """One update of the weights, and of their average, from a loss; returns its value."""
    training.model.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(training.model.parameters(), GRADIENT_NORM)
    training.optimizer.step(factor)
    update_average(training.average, training.model, training.step, training.args.ema)
    training.step += 1
    return loss.item()


def state_of(training: Resumable) -> dict[str, Any]:
    """What `restore` needs to go on, without random numbers."""
    return {
        "step": training.step,
        "model": training.model.state_dict(),
        "average": training.average.state_dict(),
        "adam": training.optimizer.adam.state_dict(),
        "momenta": training.optimizer.momenta,
    }


def restore(training: Resumable, state: Mapping[str, Any]) -> None:
    """Go on from what `state_of` returned."""
    training.step = state["step"]
    training.model.load_state_dict(state["model"])
    training.average.load_state_dict(state["average"])
    training.optimizer.adam.load_state_dict(state["adam"])
    for momentum, saved in zip(training.optimizer.momenta, state["momenta"], strict=True):
        momentum.copy_(saved)


def write_state(state: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint; readers see the old file or the whole new one, after a crash too."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        torch.save(dict(state), file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def run(training: Resumable, what: str, last: int | None = None) -> None:
    """Take steps until the last one, or until the process is asked to stop.

    Losses are logged and checkpoints kept.

    Args:
        training: the training.
        what: what a batch consists of, for the log.
        last: the last step; None is the end of the decay, or never without a decay.
    """
    args, asked = training.args, list[int]()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda signum, _: asked.append(signum))
    first, losses = training.step, list[float]()
    last = first + args.decay_steps if args.decay_steps else last
    saved = logged = time.monotonic()
    while not asked and (last is None or training.step < last):
        factor = min(1.0, (training.step + 1) / WARMUP_STEPS)
        if args.decay_steps:
            factor = 1 - (training.step - first) / args.decay_steps
        losses.append(training.take_step(factor))
        now = time.monotonic()
        if len(losses) == args.log_every:
            speed = args.batch * len(losses) / (now - logged)
            stamp = time.strftime("%Y-%m-%d %H:%M:%S")
            print(
                f"{stamp} step {training.step} loss {np.mean(losses):.5f} rate {factor:.3f} "
                f"{speed:.1f} {what}/s",
                flush=True,
            )
            losses.clear()
            logged = now
        if now - saved >= 60 * args.save_minutes:
            training.save()
            saved = time.monotonic()
    training.save()
    print(f"stopped after step {training.step}: {args.folder}", flush=True)
