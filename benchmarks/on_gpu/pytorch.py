"""A worker (`benchmarks.on_gpu.workers`): the same model in PyTorch.

It runs eager with and without a cache, or compiled without a cache.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.eager import EagerDiT, read_dit
from benchmarks.on_gpu.machine import gpu_bytes_of
from benchmarks.on_gpu.ours import CFG_SCALE
from benchmarks.on_gpu.workers import SKIPPED, Found, channel, serve
from goc_deploy.exporters.units import DTYPES
from goc_deploy.samplers import sampler_table
from goc_deploy.samplers.process import Process

ETA = 1.2
WARM_UPS = 3


@dataclass(frozen=True, slots=True)
class Sampler:
    """DDIM with guidance on all channels, as `benchmarks.work.sampled`, on a device.

    Attributes:
        predict: (x (2N, C, H, W), timesteps (2N,), labels (2N,), step) to the model
            output (2N, C_out, H, W).
        reused: steps that compute no unit.
        dtype: of the model.
        device: ``cuda`` or ``cpu``.
        steps: T.
        null: label of the unconditional rows.
    """

    predict: Callable[[Tensor, Tensor, Tensor, int], Tensor]
    reused: frozenset[int]
    dtype: torch.dtype
    device: str
    steps: int
    null: int

    @torch.inference_mode()
    def run(self, noise: np.ndarray) -> tuple[Found, np.ndarray]:
        """The times of a run, as `benchmarks.on_gpu.ours.one_run`, and its latents.

        The latents are (N, C, H, W) float32.
        """
        n, channels = noise.shape[:2]
        table = sampler_table("ddim", self.steps, Process("eps"))
        started = time.perf_counter()
        x = torch.from_numpy(noise).to(self.device)
        labels = torch.tensor(
            [*(i % self.null for i in range(n)), *[self.null] * n], device=self.device
        )
        marks = [self._mark()]
        for step, timestep in enumerate(table.timesteps):
            timesteps = torch.full((2 * n,), float(timestep), device=self.device)
            out = self.predict(torch.cat([x, x]).to(self.dtype), timesteps, labels, step)[
                :, :channels
            ].float()
            cond, uncond = out.chunk(2)
            x = table.latent[step] * x + table.model[step] * (uncond + CFG_SCALE * (cond - uncond))
            marks.append(self._mark())
        latents = x.cpu().numpy()
        wall_ms = 1e3 * (time.perf_counter() - started)
        elapsed = [self._elapsed_ms(a, b) for a, b in pairwise(marks)]
        kinds = ["collapsed" if step in self.reused else "full" for step in range(self.steps)]
        return {"wall_ms": wall_ms, "step_ms": elapsed, "kinds": kinds}, latents

    def _mark(self) -> Any:
        if self.device == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _elapsed_ms(self, first: Any, last: Any) -> float:
        return 1e3 * (last - first) if self.device == "cpu" else float(first.elapsed_time(last))


def samplers(
    checkpoint: Path, heads: int | None, precision: str, steps: int, mode: str, device: str
) -> dict[str, Sampler]:
    """Contenders by plan.

    Args:
        checkpoint: of a DiT.
        heads: attention heads, where the width does not tell.
        precision: dtype of the model.
        steps: T.
        mode: of torch.compile, or ``eager``.
        device: ``cuda``, or ``cpu`` for a dry run, where compiling stops before it makes code.
    """
    model = read_dit(checkpoint, heads).to(device, DTYPES[precision])
    eager, odd, never = EagerDiT(model), frozenset(range(1, steps, 2)), frozenset[int]()
    common = (DTYPES[precision], device, steps, model.spec.choices)
    if mode == "eager":
        return {
            "none": Sampler(eager, never, *common),
            "fora:2": Sampler(EagerDiT(model, odd), odd, *common),
            f"fora:2+gc:{ETA}": Sampler(EagerDiT(model, odd, ETA), odd, *common),
        }
    how: dict[str, Any] = {"backend": "eager"} if device == "cpu" else {"mode": mode}
    compiled = torch.compile(lambda x, t, labels: eager(x, t, labels, 0), dynamic=False, **how)
    return {"none": Sampler(lambda x, t, labels, _: compiled(x, t, labels), never, *common)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--heads", type=int)
    parser.add_argument("--precision", choices=DTYPES, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--noise", type=Path, required=True, help=".npy, (N, C, H, W)")
    parser.add_argument(
        "--latents", type=Path, help="where to write the first contender's result (.npy)"
    )
    parser.add_argument("--mode", default="eager", help="eager, or a mode of torch.compile")
    parser.add_argument("--dry", action="store_true", help="on the CPU")
    args = parser.parse_args()
    send, noise = channel(), np.load(args.noise)
    if not args.dry and not torch.cuda.is_available():
        send({SKIPPED: f"torch {torch.__version__} finds no CUDA device"})
        return
    started, device = time.perf_counter(), "cpu" if args.dry else "cuda"
    found = samplers(args.checkpoint, args.heads, args.precision, args.steps, args.mode, device)
    load_s = time.perf_counter() - started
    for number, sampler in enumerate(found.values()):
        for _ in range(WARM_UPS):
            _, latents = sampler.run(noise)
        if args.latents and not number:
            np.save(args.latents, latents)
    warm_s = time.perf_counter() - started - load_s
    report: Found = {"torch": torch.__version__}
    if not args.dry:
        report["reserved_bytes"] = torch.cuda.max_memory_reserved()
    about = {
        "load_s": load_s,
        "warm_s": warm_s,
        "gpu_bytes": gpu_bytes_of(os.getpid()),
        "report": report,
    }
    serve(send, about, {name: lambda s=sampler: s.run(noise)[0] for name, sampler in found.items()})


if __name__ == "__main__":
    main()
