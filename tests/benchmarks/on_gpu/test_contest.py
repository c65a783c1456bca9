from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.on_gpu import contest
from benchmarks.on_gpu.jobs import Deadline
from benchmarks.on_gpu.workers import Worker

ANSWERS = """
import os
from benchmarks.on_gpu.workers import channel, serve
runs = []
def run(plan):
    runs.append(plan)
    if {dies} and len(runs) == 5:
        os.abort()
    return {{"wall_ms": float(len(runs)), "step_ms": [0.0, 0.0, 1.0], "kinds": ["full"] * 3}}
serve(channel(), {{"gpu_bytes": 7}}, {{plan: lambda p=plan: run(p) for plan in ("none", "fora:2")}})
"""
SKIPS = "from benchmarks.on_gpu.workers import channel; channel()({'skipped': 'no TensorRT'})"


def workers(tmp_path: Path, **codes: str) -> dict[str, Worker]:
    return {
        name: Worker(name, [sys.executable, "-c", code], tmp_path / name)
        for name, code in codes.items()
    }


def test_rounds_interleave_and_one_that_dies_keeps_its_rounds(tmp_path: Path) -> None:
    entered = workers(
        tmp_path, good=ANSWERS.format(dies=False), dies=ANSWERS.format(dies=True), absent=SKIPS
    )
    try:
        found = contest.run_rounds(entered, Deadline(60), 3)
    finally:
        for worker in entered.values():
            worker.close()
    assert found["skipped"] == {"absent": "no TensorRT"}
    assert list(found["failed"]) == ["dies"]
    assert "SIGABRT" in found["failed"]["dies"]
    walls = {name: entry["wall_ms_rounds"] for name, entry in found["contenders"].items()}
    assert {len(times) for name, times in walls.items() if name.startswith("good")} == {3}
    assert sorted([*walls["good none"], *walls["good fora:2"]]) == [
        2,
        4,
        6,
        8,
        10,
        12,
    ]  # the second of two
    assert sum(len(walls.get(f"dies {plan}", [])) for plan in ("none", "fora:2")) == 2
    assert found["contenders"]["good none"]["gpu_bytes"] == 7


def test_results_are_compared_with_eager_pytorch(tmp_path: Path) -> None:
    latents = {
        name: tmp_path / f"{name}.npy" for name in ("onnxruntime-cuda", "pytorch", "torch.compile")
    }
    for scale, name in enumerate(("onnxruntime-cuda", "pytorch"), start=10):
        np.save(latents[name], np.full((1, 4, 2, 2), float(scale)))
    contenders: dict = {f"{name} none": {} for name in latents}
    contest.compare_results(contenders, latents)
    assert contenders["onnxruntime-cuda none"]["relative_l2"] == pytest.approx(1 / 11)
    assert contenders["pytorch none"] == contenders["torch.compile none"] == {}
