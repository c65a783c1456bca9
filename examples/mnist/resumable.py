"""Training that goes on from a checkpoint, for as many sessions as it takes."""

from __future__ import annotations

import argparse
import copy
import os
import random
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
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


class ResumableTraining(ABC):
    """A training: a model, the average of its weights, its optimizer, and the steps it took.

    Attributes:
        args: of a `resumable_parser`.
        model: its parameters that need gradients are trained.
        average: the same with averaged weights.
        draw: source of random choices.
        step: the number of steps taken.
    """

    def __init__(self, args: argparse.Namespace, model: nn.Module) -> None:
        self.args, self.model, self.average = args, model, copy.deepcopy(model)
        self.optimizer = Optimizer(model, args.adam_rate, args.muon_rate, args.bf16)
        self.draw, self.step = random.Random(args.seed), 0
        self._compiled = torch.compile(model) if args.compile else model
        self._checkpoint = args.folder / CHECKPOINT

    @abstractmethod
    def loss(self) -> Tensor:
        """The loss of a random batch."""

    @abstractmethod
    def write_weights(self) -> None:
        """Write the averaged weights for goc-export."""

    def own_state(self) -> dict[str, Any]:
        """What `restore_own` needs besides model, optimizer and step."""
        return {}

    def restore_own(self, state: Mapping[str, Any]) -> None:
        """Go on from the rest of a checkpoint, which has the step of this training already.

        Random numbers are new ones here, which depend on the step.
        """
        del state
        self.draw.seed(self.args.seed + self.step)
        torch.manual_seed(self.args.seed + self.step)

    def predict(self, *given: Tensor) -> Any:
        """What the model makes of a batch."""
        with (
            torch.autocast(given[0].device.type, torch.bfloat16, enabled=self.args.bf16),
            sdpa_kernel(SDPBackend.MATH),  # the fused attention of a CPU is slow on few tokens
        ):
            return self._compiled(*given)

    def take_step(self, factor: float) -> float:
        """One update at this factor of the learning rates; returns the loss."""
        loss = self.loss()
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), GRADIENT_NORM)
        self.optimizer.step(factor)
        update_average(self.average, self.model, self.step, self.args.ema)
        self.step += 1
        return loss.item()

    def save(self) -> None:
        """Write the checkpoint, and the averaged weights for goc-export."""
        state = {
            "step": self.step,
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "adam": self.optimizer.adam.state_dict(),
            "momenta": self.optimizer.momenta,
        }
        write_state(state | self.own_state(), self._checkpoint)
        self.write_weights()

    def restore(self) -> None:
        """Go on from the checkpoint."""
        device = next(self.model.parameters()).device
        state = torch.load(self._checkpoint, map_location=device, weights_only=True)
        self.step = state["step"]
        self.restore_own(state)
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.adam.load_state_dict(state["adam"])
        for momentum, saved in zip(self.optimizer.momenta, state["momenta"], strict=True):
            momentum.copy_(saved)

    def start(self) -> bool:
        """Go on from the checkpoint, if there is one; whether there was."""
        resumed: bool = self._checkpoint.exists()
        if resumed:
            self.restore()
        parameters = sum(p.numel() for p in self.model.parameters())
        print(f"{parameters} parameters, step {self.step}: {self.args.folder}", flush=True)
        return resumed

    def run(self, what: str) -> None:
        """Take steps until the last one, or until the process is asked to stop.

        Losses are logged and checkpoints kept.

        Args:
            what: what a batch consists of, for the log.
        """
        args, asked = self.args, list[int]()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda signum, _: asked.append(signum))
        first, losses = self.step, list[float]()
        last = first + args.decay_steps if args.decay_steps else args.steps
        saved = logged = time.monotonic()
        while not asked and (last is None or self.step < last):
            factor = min(1.0, (self.step + 1) / WARMUP_STEPS)
            if args.decay_steps:
                factor = 1 - (self.step - first) / args.decay_steps
            losses.append(self.take_step(factor))
            now = time.monotonic()
            if len(losses) == args.log_every:
                speed = args.batch * len(losses) / (now - logged)
                stamp = time.strftime("%Y-%m-%d %H:%M:%S")
                print(
                    f"{stamp} step {self.step} loss {np.mean(losses):.5f} rate {factor:.3f} "
                    f"{speed:.1f} {what}/s",
                    flush=True,
                )
                losses.clear()
                logged = now
            if now - saved >= 60 * args.save_minutes:
                self.save()
                saved = time.monotonic()
        self.save()
        print(f"stopped after step {self.step}: {args.folder}", flush=True)


def write_state(state: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint; readers see the old file or the whole new one, after a crash too."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        torch.save(dict(state), file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
