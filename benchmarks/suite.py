"""goc_deploy beside what a user would pick instead, in one process.

All have the same weights, noise, guidance and threads.

    python benchmarks/suite.py --model demo --batch 1 --batch 4
    python benchmarks/suite.py --model XL/2 --batch 1 --rounds 2

Every round runs every contender once; times are medians over rounds. A JSON file per (model, batch)
goes to --output.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks import contenders
from benchmarks.eager import read_dit
from benchmarks.make_checkpoint import random_state, spec_of
from benchmarks.peaks import measured_peaks
from benchmarks.work import Contender, Outcome, Work
from goc_deploy.runtime.pipeline import Pipeline
from goc_deploy.samplers import sampler_table
from goc_deploy.samplers.process import Process
from goc_deploy.schedule.operations import full_step_flops
from goc_deploy.trace import Span, totals_ms

DEMO, DEMO_HEADS = Path(__file__).resolve().parents[1] / "examples/mnist/dit_mnist.pt", 4
PACKAGES = ("goc_deploy", "torch", "onnxruntime-gpu", "onnxruntime", "diffusers", "numpy")
LOAD_PROBE = """
import json, sys, time
started = time.perf_counter()
import goc_deploy
batch_size, threads = int(sys.argv[2]), int(sys.argv[3])
pipe = goc_deploy.load(sys.argv[1], plan="warm", batch_size=batch_size, threads=threads)
loaded = time.perf_counter()
pages = int(open("/proc/self/statm").read().split()[1])
steps = []
pipe.generate([0], callback=lambda event: steps.append(time.perf_counter()))
status = open("/proc/self/status")
(peak,) = (1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))
times = {"load_s": loaded - started, "first_step_s": steps[0] - loaded}
print(json.dumps({**times, "resident_bytes": 4096 * pages, "run_peak_bytes": peak}))
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", action="append", help="demo, S/2, B/2, L/2, XL/2; repeatable  [default: demo]"
    )
    parser.add_argument(
        "--batch", action="append", type=int, help="images per run; repeatable  [default: 1]"
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--only", default="", help="comma-separated prefixes of contender names  [default: all]"
    )
    parser.add_argument(
        "--work", type=Path, help="folder for checkpoints and engines, kept  [default: temporary]"
    )
    parser.add_argument("--output", type=Path, default=Path("out/bench"))
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(prefix="goc-bench-") as temporary:
        for model in args.model or ["demo"]:
            for batch in args.batch or [1]:
                found = measure(model, batch, args, args.work or Path(temporary))
                name = f"{model.replace('/', '-')}-batch-{batch}.json"
                (args.output / name).write_text(
                    json.dumps(found, indent=1) + "\n", encoding="utf-8"
                )
                show(found)
                gc.collect()
    return 0


def measure(name: str, batch: int, args: argparse.Namespace, work_folder: Path) -> dict[str, Any]:
    """Everything about one model at one batch size."""
    folder = work_folder / name.replace("/", "-")
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = _checkpoint(name, folder)
    heads = DEMO_HEADS if name == "demo" else None
    exported = _exported(checkpoint, folder / "engine", heads, max(batch, 16))
    contenders.add_warm_plan(folder / "engine")
    loaded = _probed_load(folder / "engine", batch, args.threads)  # while nothing else is in memory
    model = read_dit(checkpoint, heads)
    spec = model.spec

    plans, pipes = contenders.ours(folder / "engine", args.steps, batch, args.threads)
    makers: list[tuple[str, Callable[[], list[Contender]]]] = [
        ("pytorch", lambda: list(contenders.pytorch(model, args.steps))),
        ("torch.compile none", lambda: [contenders.torch_compile(model)]),
        ("diffusers none", lambda: [contenders.diffusers_pipeline(model)]),
        ("one graph none", lambda: [contenders.monolithic(model, folder, args.threads)]),
        ("ours", lambda: plans),
    ]
    noise = (
        np.random.default_rng(0)
        .standard_normal((batch, spec.channels, spec.side, spec.side))
        .astype(np.float32)
    )
    labels = tuple(i % spec.choices for i in range(batch))
    work = Work(noise, labels, spec.choices, 4.0, sampler_table("ddim", args.steps, Process("eps")))
    skipped: dict[str, str] = {}
    entered: list[Contender] = []
    wanted = args.only.split(",")
    for prefix, make in makers:
        if not any(prefix.startswith(only) or only.startswith(prefix) for only in wanted):
            continue  # making one may take minutes
        try:
            for contender in make():
                if any(contender.name.startswith(only) for only in wanted):
                    _warm_up(contender, work)
                    entered.append(contender)
        except Exception as error:
            skipped[prefix] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            _say(f"{prefix} is skipped: {skipped[prefix]}")

    if not entered:
        raise SystemExit(f"no contender is left; skipped: {skipped or args.only}")
    outcomes: dict[str, list[Outcome]] = {contender.name: [] for contender in entered}
    for round_number in range(args.rounds):
        turn = round_number % len(entered)
        for contender in entered[turn:] + entered[:turn]:
            _say(
                f"{name}, {batch} images, round {round_number + 1} of {args.rounds}: "
                f"{contender.name}"
            )
            outcomes[contender.name].append(contender.run(work))
    profiled: list[Span] = []
    pipes[f"fora:2+gc:{contenders.ETA}"].generate(labels, latents=noise, spans=profiled)
    kinds = {
        f"ours {plan}": [pipe.plan.step_kind(k) for k in range(args.steps)]
        for plan, pipe in pipes.items()
    }
    return {
        "model": name,
        "batch": batch,
        "steps": args.steps,
        "rounds": args.rounds,
        "threads": args.threads,
        "command": f"python benchmarks/suite.py --model {name} --batch {batch} "
        f"--steps {args.steps} --rounds {args.rounds}"
        + (f" --only '{args.only}'" if args.only else ""),
        **machine_report(),
        "depth": spec.depth,
        "matmul_flops_full_step": full_step_flops(spec, 2 * batch),
        "peaks": measured_peaks(spec, 2 * batch, args.threads),
        "export": exported,
        "load": loaded,
        "cache": {plan: _cache(pipe) for plan, pipe in pipes.items()},
        "profile_ms": totals_ms(profiled),
        "skipped": skipped,
        "contenders": {c.name: _summary(c, outcomes, kinds.get(c.name)) for c in entered},
    }


def _cache(pipe: Pipeline) -> dict[str, Any]:
    plan, spec = pipe.plan, pipe.spec
    rows = 2 * pipe.batch_size
    return {
        "cache_bytes": plan.cache_bytes(spec, rows, 4),
        "naive_cache_bytes": plan.naive_cache_bytes(spec, rows, 4),
        "computed_units": plan.schedule.computed,
        "all_units": plan.steps * spec.units,
    }


def _summary(
    contender: Contender, outcomes: dict[str, list[Outcome]], kinds: list[str] | None
) -> dict[str, Any]:
    runs = outcomes[contender.name]
    step_ms = [median(run.step_ms[k] for run in runs) for k in range(len(runs[0].step_ms))]
    twin = outcomes.get(contender.twin)
    difference = None
    if twin:
        expected = twin[0].latents
        difference = float(np.linalg.norm(runs[0].latents - expected) / np.linalg.norm(expected))
    by_kind = {
        kind: median(ms for ms, k in zip(step_ms, kinds, strict=True) if k == kind)
        for kind in sorted({*(kinds or [])})
    }
    return {
        "what": contender.what,
        "total_ms": median(run.total_ms for run in runs),
        "total_ms_rounds": [run.total_ms for run in runs],
        "step_ms": step_ms,
        "step_ms_by_kind": by_kind,
        "relative_l2_to_twin": difference,
    }


def _warm_up(contender: Contender, work: Work) -> None:
    """The first step, which compiles, faults pages in and fills caches.

    Our plans are warm (`contenders.ours`).
    """
    if contender.name.startswith("ours"):
        return
    columns = ("timesteps", "latent", "model", "noise", "spread", "estimate", "lag_coefficients")
    first = replace(work.table, **{column: getattr(work.table, column)[:1] for column in columns})
    _say(f"warming up {contender.name}")
    contender.run(replace(work, table=first))


def _checkpoint(name: str, folder: Path) -> Path:
    if name == "demo":
        return DEMO
    path = folder / "checkpoint.pt"
    if not path.exists():
        _say(f"making a {name} checkpoint with random weights")
        torch.save(random_state(spec_of(name, 256), 0), path)
    return path


def _exported(checkpoint: Path, engine: Path, heads: int | None, max_batch: int) -> dict[str, Any]:
    """Export in a process of its own, for its wall time and peak memory."""
    command = [
        str(Path(sys.executable).with_name("goc-export")),
        str(checkpoint),
        "-o",
        str(engine),
        "--force",
    ]
    command += [
        "--plan",
        "none",
        "--max-batch",
        str(max_batch),
        *(["--num-heads", str(heads)] if heads else []),
    ]
    _say("exporting")
    started = time.perf_counter()
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"goc-export ended with exit code {process.returncode}")
    peak = usage.ru_maxrss * 1024
    size = checkpoint.stat().st_size
    return {
        "wall_s": time.perf_counter() - started,
        "peak_rss_bytes": peak,
        "checkpoint_bytes": size,
    }


def _probed_load(engine: Path, batch: int, threads: int) -> dict[str, Any]:
    """Load and first step in a fresh process, with the files in the page cache."""
    done = subprocess.run(
        [sys.executable, "-c", LOAD_PROBE, str(engine), str(batch), str(threads)],
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def machine_report() -> dict[str, Any]:
    """Date, machine and versions."""
    return {
        "date": date.today().isoformat(),
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "system": platform.system(),
        },
        "versions": _versions(),
    }


def _processor() -> str:
    lines = (
        Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if Path("/proc/cpuinfo").exists()
        else []
    )
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def show(found: dict[str, Any]) -> None:
    """Print the totals, the slowest first."""
    entries = found["contenders"]
    table = Table(
        title=f"{found['model']}, {found['batch']} images, {found['steps']} steps, "
        f"{found['threads']} threads"
    )
    for column in (
        "contender",
        "total ms",
        "min-max",
        "no cache of ours / total",
        "relative L2 to PyTorch",
    ):
        table.add_column(column, justify="left" if column == "contender" else "right")
    base = entries.get("ours none", next(iter(entries.values())))["total_ms"]
    for name, entry in entries.items():
        rounds, difference = entry["total_ms_rounds"], entry["relative_l2_to_twin"]
        shown = "" if difference is None else f"{difference:.1e}"
        spread = f"{min(rounds):.1f}-{max(rounds):.1f}"
        table.add_row(
            name, f"{entry['total_ms']:.1f}", spread, f"{base / entry['total_ms']:.3f}", shown
        )
    Console().print(table)


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
