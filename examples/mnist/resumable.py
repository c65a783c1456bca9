"""Training that goes on from a checkpoint, for as many sessions as it takes."""

from __future__ import annotations

import argparse
import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from training import GRADIENT_NORM, WARMUP_STEPS, Optimizer, update_average

CHECKPOINT = "checkpoint.pt"


def resumable_parser(description: str, folder: Path) -> argparse.ArgumentParser:
    """The options of every training that goes on from a checkpoint in a folder."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--folder",
        type=Path,
        default=folder.expanduser(),
        help="of the checkpoint (default %(default)s)",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the checkpoint, if there is one"
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--steps", type=int, help="stop at this step of all sessions together (default: never)"
    )
    length.add_argument(
        "--decay-steps",
        type=int,
        help="let the rates fall to zero in so many steps from here, and stop",
    )
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument(
        "--adam-rate", type=float, default=3e-3, help="learning rate of AdamW (default %(default)s)"
    )
    parser.add_argument(
        "--muon-rate", type=float, default=0.02, help="learning rate of Muon (default %(default)s)"
    )
    parser.add_argument(
        "--ema",
        type=float,
        default=0.999,
        help="decay of the averaged weights (default %(default)s)",
    )
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--bf16", action="store_true", help="matrix products in bfloat16")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile; needs a C++ compiler on a CPU"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-minutes", type=float, default=5.0)
    parser.add_argument(
        "--log-every", type=int, default=100, help="steps per line (default %(default)s)"
    )
    return parser


def parsed(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments of a `resumable_parser`; a checkpoint is not overwritten by a new training."""
    args = parser.parse_args(argv)
    if (args.folder / CHECKPOINT).exists() and not args.resume:
        parser.error(
            f"{args.folder} has a checkpoint; go on from it with --resume, or choose another "
            "--folder"
        )
    torch.set_num_threads(args.threads)
    args.folder.mkdir(parents=True, exist_ok=True)
    return args


class Resumable(Protocol):
    """A training: a model, the average of its weights, its optimizer, and the steps it took.

    Attributes:
        args: of a `resumable_parser`.
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

    def restore(self) -> None:
        """Go on from the checkpoint."""


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


def start(training: Resumable) -> bool:
    """Go on from the checkpoint, if there is one; whether there was."""
    resumed = (training.args.folder / CHECKPOINT).exists()
    if resumed:
        training.restore()
    parameters = sum(p.numel() for p in training.model.parameters())
    print(f"{parameters} parameters, step {training.step}: {training.args.folder}", flush=True)
    return resumed


def run(training: Resumable, what: str) -> None:
    """Take steps until the last one, or until the process is asked to stop.

    Losses are logged and checkpoints kept.

    Args:
        training: the training.
        what: what a batch consists of, for the log.
    """
    args, asked = training.args, list[int]()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda signum, _: asked.append(signum))
    first, losses = training.step, list[float]()
    last = first + args.decay_steps if args.decay_steps else args.steps
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
