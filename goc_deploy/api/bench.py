"""Latency of plans, side by side in one process."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.options import BenchOptions, Progress
from goc_deploy.trace import Span

if TYPE_CHECKING:
    from goc_deploy.runtime.pipeline import Pipeline


def compare_plans(
    engine_dir: Path,
    options: BenchOptions,
    progress: Progress,
    spans: dict[str, list[Span]] | None = None,
) -> dict[str, Any]:
    """Run every plan once per round, in turn, so that drift of the machine hits all alike.

    Args:
        engine_dir: the engine directory.
        options: what to run.
        progress: called with (what, done, total).
        spans: where to record one more run of each plan, after the measured ones.

    Returns:
        ``machine``, and for each plan its medians, every round's total, and its `Result.report`.
    """
    from goc_deploy.api.facade import load_plans

    names = options.plans or [entry.name for entry in EngineDir.open(engine_dir).manifest.plans]
    with ExitStack() as stack:
        pipes = [
            stack.enter_context(pipe)
            for pipe in load_plans(
                engine_dir,
                names,
                backend=options.backend,
                device=options.device,
                batch_size=len(options.labels),
                threads=options.threads,
                history=options.history,
            )
        ]
        reports = _measured(pipes, options, progress)
        if spans is not None:
            for pipe in pipes:
                spans[pipe.plan.name] = []
                pipe.generate(
                    options.labels, cfg_scale=options.cfg_scale, spans=spans[pipe.plan.name]
                )
    return {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "system": platform.platform(),
            "python": platform.python_version(),
        },
        "plans": {name: _summary(rounds_of) for name, rounds_of in reports.items()},
    }


def _measured(
    pipes: Sequence[Pipeline], options: BenchOptions, progress: Progress
) -> dict[str, list[dict[str, Any]]]:
    """The report of each round by plan, without the rounds that warm up."""
    rounds = options.warmup * max(pipe.runs_to_warm for pipe in pipes) + options.repeats
    reports: dict[str, list[dict[str, Any]]] = {}
    for number in range(rounds):
        for i, pipe in enumerate(pipes):
            name, done = pipe.plan.name, number * len(pipes) + i
            progress(f"round {number + 1}: {name}", done, rounds * len(pipes))
            result = pipe.generate(options.labels, cfg_scale=options.cfg_scale, decode=False)
            if number >= rounds - options.repeats:
                reports.setdefault(name, []).append(result.report)
    return reports


def _summary(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    last = rounds[-1]
    steps = last["batches"][0]["steps"]
    step_ms = [median(r["batches"][0]["steps"][k]["ms"] for r in rounds) for k in range(len(steps))]
    by_kind = {
        kind: median(ms for ms, s in zip(step_ms, steps, strict=True) if s["kind"] == kind)
        for kind in last["step_kinds"]
    }
    kept = {key: value for key, value in last.items() if key not in ("batches", "total_ms")}
    return {
        **kept,
        "total_ms": median(r["total_ms"] for r in rounds),
        "total_ms_rounds": [r["total_ms"] for r in rounds],
        "prepare_ms": median(r["batches"][0]["prepare_ms"] for r in rounds),
        "step_ms": step_ms,
        "step_ms_by_kind": by_kind,
    }


def summary_rows(comparison: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """A row per plan: total, spread, speed-up over the first plan, median step of each kind."""
    columns = [
        "plan",
        "total ms",
        "min-max",
        "speed-up",
        "units computed",
        "full step ms",
        "mixed",
        "collapsed",
        "collapsed/full",
        "cache MB",
    ]
    plans = comparison["plans"]
    baseline = next(iter(plans.values()))["total_ms"]
    full = median(
        [p["step_ms_by_kind"]["full"] for p in plans.values() if "full" in p["step_ms_by_kind"]]
    )
    rows = []
    for name, p in plans.items():
        kinds = p["step_ms_by_kind"]
        collapsed = kinds.get("collapsed")
        rows.append(
            [
                name,
                f"{p['total_ms']:.1f}",
                f"{min(p['total_ms_rounds']):.1f}-{max(p['total_ms_rounds']):.1f}",
                f"{baseline / p['total_ms']:.3f}",
                f"{100 * p['computed_units'] / p['all_units']:.1f} %",
                *(
                    f"{kinds[kind]:.2f}" if kind in kinds else ""
                    for kind in ("full", "mixed", "collapsed")
                ),
                "" if collapsed is None else f"{collapsed / full:.4f}",
                f"{p['cache_bytes'] / 1e6:.1f}",
            ]
        )
    return columns, rows
