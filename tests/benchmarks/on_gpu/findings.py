"""Findings as a run on a GPU would leave them, with numbers that are made up."""

from __future__ import annotations

from typing import Any

from benchmarks.on_gpu import results


def contender(wall: float, **kinds: float) -> dict[str, Any]:
    return {
        "wall_ms": wall,
        "wall_ms_rounds": [wall],
        "step_ms": [],
        "step_ms_by_kind": kinds,
        "gpu_bytes": 2 * 10**9,
    }


def run(images: int, **skipped: str) -> dict[str, Any]:
    contenders = {
        "onnxruntime-cuda none": contender(20.0, full=1.0),
        "onnxruntime-cuda fora:2": contender(10.0, full=1.0, collapsed=0.05),
        "onnxruntime-cuda fora:2+gc:1.2": contender(11.0, full=1.0, collapsed=0.1),
        "pytorch none": contender(60.0, full=3.0),
        "torch.compile none": contender(30.0, full=1.5),
        "torch.compile reduce-overhead none": contender(24.0, full=1.2),
    }
    return {
        "images": images,
        "rounds": 9,
        "contenders": contenders,
        "skipped": skipped,
        "failed": {},
    }


def findings() -> dict[str, Any]:
    runs = [
        run(1),
        {**run(8, tensorrt="TensorRT is not installed"), "failed": {"pytorch": "ended by SIGKILL"}},
    ]
    golden = {"backend": "onnxruntime-cuda", "plan": "none", "most": 1e-4}
    return {
        "format": results.FORMAT,
        "dry": False,
        "date": "2026-01-02",
        "command": "python benchmarks/gpu.py",
        "machine": {
            "card": "NVIDIA H100 80GB HBM3",
            "driver": "580.1",
            "cuda": "13.0",
            "versions": {"numpy": "2.5"},
        },
        "ceilings": {"copy_gb_s": 3000.0, "fp16_tflops": 800.0},
        "kernel": [
            {
                "form": "reuse",
                "rows": 2,
                "nbytes": 69 * 10**6,
                "launched_us": 50.0,
                "replayed_us": 46.0,
                "gb_s": 1500.0,
            },
            {
                "form": "gradient",
                "rows": 2,
                "nbytes": 200 * 10**6,
                "launched_us": 99.0,
                "replayed_us": None,
                "gb_s": 2020.0,
            },
        ],
        "goldens": [
            {**golden, "precision": "fp32", "worst_step": 1e-5, "runs_equal": True},
            {**golden, "precision": "fp16", "worst_step": 5e-3, "runs_equal": False},
            {
                **golden,
                "precision": "bf16",
                "worst_step": None,
                "failed": "EngineDirError: no kernel",
            },
            {
                **golden,
                "backend": "tensorrt",
                "precision": "fp32",
                "worst_step": None,
                "not_here": "no TensorRT",
            },
        ],
        "dit": {
            "model": "XL/2",
            "precision": "fp16",
            "steps": 20,
            "many": ["fora:5", 50],
            "runs": runs,
        },
        "targets": results.judged(runs, ["onnxruntime-cuda"]),
        "parts": [
            {"part": "kernel", "state": "done", "seconds": 9.0, "reason": ""},
            {
                "part": "goldens tensorrt",
                "state": "left out",
                "seconds": 0.0,
                "reason": "3 s were left",
            },
        ],
    }
