"""A worker (`benchmarks.on_gpu.workers`): the plans of an engine directory on one backend."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import goc_deploy
from benchmarks.on_gpu.machine import gpu_bytes_of
from benchmarks.on_gpu.workers import SKIPPED, Found, channel, serve
from goc_deploy.errors import EnvironmentUnsupportedError
from goc_deploy.runtime.pipeline import Pipeline
from goc_deploy.trace import Span, chrome_trace

WARM_UPS = 3  # launched one by one, recorded, replayed
CFG_SCALE = 4.0
KEPT = (
    "backend",
    "version",
    "device",
    "engine_weights",
    "cuda_graphs",
    "weight_bytes",
    "scratch_bytes",
    "buffer_bytes",
)


def pipelines(
    engine: Path, plans: Sequence[str], backend: str, images: int, *, graphs: bool
) -> list[Pipeline]:
    """Plans that share the weights.

    Without CUDA graphs each plan has its own, because only single plans can be loaded without.
    """
    if graphs:
        return goc_deploy.api.load_plans(engine, plans, backend=backend, batch_size=images)
    return [
        goc_deploy.load(engine, plan=p, backend=backend, batch_size=images, cuda_graphs=False)
        for p in plans
    ]


def one_run(pipe: Pipeline, noise: np.ndarray, **more: Any) -> tuple[Found, np.ndarray]:
    """The times of a run, and its latents.

    ``wall_ms`` is from noise on the host to latents on the host.
    """
    started = time.perf_counter()
    labels = [i % pipe.spec.choices for i in range(len(noise))]
    done = pipe.generate(
        labels,
        latents=noise,
        cfg_scale=CFG_SCALE,
        cfg_channels=noise.shape[1],
        decode=False,
        **more,
    )
    wall_ms = 1e3 * (time.perf_counter() - started)
    steps = done.report["batches"][0]["steps"]
    found = {
        "wall_ms": wall_ms,
        "step_ms": [s["ms"] for s in steps],
        "kinds": [s["kind"] for s in steps],
    }
    return found, done.latents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engine", type=Path)
    parser.add_argument("--backend", required=True)
    parser.add_argument("--plan", action="append", required=True)
    parser.add_argument("--noise", type=Path, required=True, help=".npy, (N, C, H, W)")
    parser.add_argument(
        "--latents", type=Path, help="where to write the first plan's result (.npy)"
    )
    parser.add_argument(
        "--trace", type=Path, help="where to write a Chrome trace of one run of each plan"
    )
    parser.add_argument("--no-cuda-graphs", action="store_true")
    args = parser.parse_args()
    send, noise = channel(), np.load(args.noise)
    started = time.perf_counter()
    try:
        pipes = dict(
            zip(
                args.plan,
                pipelines(
                    args.engine, args.plan, args.backend, len(noise), graphs=not args.no_cuda_graphs
                ),
                strict=True,
            )
        )
    except EnvironmentUnsupportedError as reason:
        send({SKIPPED: str(reason)})
        return
    load_s = time.perf_counter() - started
    spans: dict[str, list[Span]] = {}
    for plan, pipe in pipes.items():
        for _ in range(WARM_UPS):
            _, latents = one_run(pipe, noise)
        if args.latents and plan == args.plan[0]:
            np.save(args.latents, latents)
        if args.trace:
            one_run(pipe, noise, spans=spans.setdefault(plan, []))
    if args.trace:
        args.trace.write_text(json.dumps(chrome_trace(spans)), encoding="utf-8")
    report = pipes[args.plan[0]].generate([0] * len(noise), decode=False).report
    about = {
        "load_s": load_s,
        "warm_s": time.perf_counter() - started - load_s,
        "gpu_bytes": gpu_bytes_of(os.getpid()),
    }
    about["report"] = {key: report[key] for key in KEPT if key in report}
    serve(send, about, {plan: lambda p=pipe: one_run(p, noise)[0] for plan, pipe in pipes.items()})


if __name__ == "__main__":
    main()
