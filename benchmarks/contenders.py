"""Who takes part: PyTorch, torch.compile, diffusers, one ONNX graph, and goc_deploy's plans."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

import goc_deploy
from benchmarks.eager import EagerDiT
from benchmarks.monolithic import MonolithicGraph, write_graph
from benchmarks.work import Contender, Outcome, Work, sampled
from goc_deploy.api import load_plans
from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.exporters.architectures.dit_model import DiT
from goc_deploy.runtime.pipeline import Pipeline
from goc_deploy.schedule import COMPUTE, REUSE, Schedule
from goc_deploy.schedule.schedule import schedule_to_json
from goc_deploy.spec import ModelSpec

ETA = 1.2
# The units, of 56, that Learning-to-Cache's public router for DiT-XL/2 and 20 steps caches at steps
# 1, 3, ..., 19 (threshold 0.1).
L2C_CACHED = (56, 56, 52, 48, 30, 3, 1, 1, 1, 0)
PLANS = {
    "none": "no cache",
    "fora:2": "FORA, 50 % of the units computed",
    f"fora:2+gc:{ETA}": "GOC, 50 %",
    "fora:2@0.5": "FORA, 75 % computed (FORA-25)",
    f"fora:2@0.5+gc:{ETA}": "GOC, 75 % computed",
    "l2c-like": "reuse as unevenly as a Learning-to-Cache router",
}


def l2c_like_schedule(spec: ModelSpec, steps: int) -> Schedule:
    """Plain reuse at odd steps of random units, as many as the public router caches."""
    generator, rows = random.Random(0), []
    for step in range(steps):
        share = L2C_CACHED[min(step // 2 * 20 // steps, 9)] / 56 if step % 2 else 0.0
        cached = set(generator.sample(range(spec.units), round(share * spec.units)))
        rows.append(tuple(REUSE if unit in cached else COMPUTE for unit in range(spec.units)))
    return replace(Schedule.of(spec, tuple(rows)), policy="l2c-like")


def pytorch(model: DiT, steps: int) -> Iterator[Contender]:
    """(a) The reference algorithm in eager PyTorch."""
    odd = frozenset(range(1, steps, 2))
    variants = {
        "none": EagerDiT(model),
        "fora:2": EagerDiT(model, odd),
        f"fora:2+gc:{ETA}": EagerDiT(model, odd, ETA),
    }
    for spec, predict in variants.items():
        name = f"pytorch {spec}"
        yield Contender(
            name, f"eager PyTorch, {PLANS[spec]}", name, lambda work, p=predict: sampled(p, work)
        )


def torch_compile(model: DiT) -> Contender:
    """(b) The model without cache through torch.compile."""
    eager = EagerDiT(model)
    compiled = torch.compile(lambda x, t, labels: eager(x, t, labels, 0))
    return Contender(
        "torch.compile none",
        "torch.compile, no cache",
        "pytorch none",
        lambda work: sampled(lambda x, t, labels, _: compiled(x, t, labels), work),
    )


def diffusers_pipeline(model: DiT) -> Contender:
    """(c) diffusers' DiTPipeline.

    Raises:
        ValueError: it cannot run this model.
    """
    if model.spec.choices != 1000:
        raise ValueError(f"DiTPipeline's null label is 1000, this model's is {model.spec.choices}")
    from benchmarks.diffusers_dit import run_pipeline, transformer_from_dit

    transformer = transformer_from_dit(model)
    return Contender(
        "diffusers none",
        "diffusers DiTPipeline, no cache",
        "pytorch none",
        lambda work: run_pipeline(transformer, work),
    )


def monolithic(model: DiT, folder: Path, threads: int) -> Contender:
    """(d) One ONNX graph per step."""
    path = folder / "monolithic.onnx"
    if not path.exists():
        write_graph(model, path)
    graph = MonolithicGraph(path, threads)
    return Contender(
        "one graph none",
        "one ONNX graph per step on ONNX Runtime, no cache",
        "pytorch none",
        graph.run,
    )


def add_warm_plan(engine: Path) -> str:
    """Add a plan of two computed steps, unless it is there; returns its name."""
    return goc_deploy.add_plan(engine, "none", name="warm", steps=2).name


def ours(
    engine: Path, steps: int, batch: int, threads: int
) -> tuple[list[Contender], dict[str, Pipeline]]:
    """(e) goc_deploy's plans, added to the engine, and a two-step plan for warming up."""
    spec = EngineDir.open(engine).manifest.model
    file = engine.with_name("l2c-like.json")
    file.write_text(schedule_to_json(l2c_like_schedule(spec, steps)), encoding="utf-8")
    names = []
    for plan in PLANS:
        source = f"file:{file}" if plan == "l2c-like" else plan
        names.append(
            goc_deploy.add_plan(engine, source, name=f"t{steps}-{_safe(plan)}", steps=steps).name
        )
    pipes = load_plans(engine, [*names, add_warm_plan(engine)], batch_size=batch, threads=threads)
    pipes[-1].generate([0] * batch)
    found = dict(zip(PLANS, pipes, strict=False))
    twins = {"none", "fora:2", f"fora:2+gc:{ETA}"}
    return [
        Contender(
            f"ours {plan}",
            f"goc_deploy, {what}",
            f"pytorch {plan}" if plan in twins else "",
            _runner(found[plan]),
        )
        for plan, what in PLANS.items()
    ], found


def _safe(plan: str) -> str:
    return plan.replace(":", "-")


def _runner(pipe: Pipeline) -> Callable[[Work], Outcome]:
    def run(work: Work) -> Outcome:
        channels = work.noise.shape[1]
        done = pipe.generate(
            work.labels, cfg_scale=work.cfg_scale, cfg_channels=channels, latents=work.noise
        )
        step_ms = tuple(step["ms"] for step in done.report["batches"][0]["steps"])
        return Outcome(done.latents, step_ms, done.report["total_ms"])

    return run
