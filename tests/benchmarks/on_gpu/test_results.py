from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.on_gpu import results
from benchmarks.on_gpu.table import table
from tests.benchmarks.on_gpu.findings import findings, run


def test_targets_are_those_of_one_and_eight_images() -> None:
    bounds = {(t.images, t.what): (t.bound, t.least) for t in results.TARGETS}
    assert bounds[1, "collapsed step of `fora:2` / full step"] == (0.08, False)
    assert bounds[8, "collapsed step of `fora:2+gc:1.2` / full step"] == (0.03, False)
    assert (bounds[1, "`none` / `fora:2`"], bounds[8, "`none` / `fora:2`"]) == (
        (1.85, True),
        (1.95, True),
    )
    assert bounds[1, "torch.compile / `none`"] == (1.0, True)
    assert bounds[8, "torch.compile / `fora:2+gc:1.2`"] == (1.9, True)


def test_ratios_are_of_medians_and_of_the_fastest_mode_of_torch_compile() -> None:
    found = {(e["images"], e["what"]): e for e in results.judged([run(1)], ["onnxruntime-cuda"])}
    collapsed = found[1, "collapsed step of `fora:2` / full step"]
    assert (collapsed["value"], collapsed["bound"], collapsed["verdict"]) == (
        pytest.approx(0.05),
        "<= 0.08",
        "met",
    )
    assert found[1, "collapsed step of `fora:2+gc:1.2` / full step"]["verdict"] == "missed"
    assert found[1, "`none` / `fora:2`"]["value"] == pytest.approx(2.0)
    assert found[1, "torch.compile / `none`"]["value"] == pytest.approx(24 / 20)
    assert found[1, "torch.compile / `fora:2+gc:1.2`"]["value"] == pytest.approx(24 / 11)
    assert {e["verdict"] for (images, _), e in found.items() if images == 8} == {"not measured"}


def test_a_value_on_the_bound_meets_it() -> None:
    least, most = (next(t for t in results.TARGETS if t.least is least) for least in (True, False))
    assert (least.verdict(least.bound), most.verdict(most.bound)) == ("met", "met")
    assert (least.verdict(least.bound - 1e-6), most.verdict(most.bound + 1e-6)) == (
        "missed",
        "missed",
    )
    assert least.verdict(float("nan")) == "missed"


def test_medians_leave_out_the_first_steps_and_keep_every_round() -> None:
    kinds = ["full", "full", "full", "collapsed", "full"]
    runs = [
        {"wall_ms": 9.0 + r, "step_ms": [99.0, 99.0, 4.0 + r, 0.5, 6.0 + r], "kinds": kinds}
        for r in range(3)
    ]
    found = results.summary(runs)
    assert found["wall_ms"] == 10.0
    assert found["wall_ms_rounds"] == [9.0, 10.0, 11.0]
    assert found["step_ms_by_kind"] == {"full": 6.0, "collapsed": 0.5}


def test_findings_survive_a_file(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    path.write_text(json.dumps(findings()))
    assert results.read(path) == findings()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 0}, "has format 0, and this version reads 1"),
        ({"kernel": None}, ""),
        (
            {"dit": {"runs": [{"images": 8, "contenders": {"pytorch none": {}}}]}},
            "8 images, pytorch none: the file lacks",
        ),
    ],
)
def test_a_file_of_another_format_is_refused(change: dict, message: str) -> None:
    found = {**findings(), **change}
    if not message:
        del found["kernel"]
        message = "the file lacks kernel"
    with pytest.raises(ValueError, match=message):
        results.check(found)


def test_the_table_has_a_row_for_everything() -> None:
    lines = table(findings()).splitlines()
    assert lines[0] == "NVIDIA H100 80GB HBM3, driver 580.1, CUDA 13.0, numpy 2.5, 2026-01-02"
    for row in (
        "| ceilings | copy | 3000 GB/s |  |  |",
        (
            "| kernel | reuse, 2 rows | 50.0 us launched, 46.0 us replayed; 1500 GB/s | 69 MB "
            "| 50 % of copy |"
        ),
        "| kernel | gradient, 2 rows | 99.0 us launched; 2020 GB/s | 200 MB | 67 % of copy |",
        (
            "| goldens | onnxruntime-cuda, fp32, `none` | 1.0e-05, the same every run "
            "| < 1e-04 | met |"
        ),
        "| goldens | onnxruntime-cuda, fp16, `none` | 5.0e-03, runs differ | < 1e-04 | missed |",
        (
            "| goldens | onnxruntime-cuda, bf16, `none` | EngineDirError: no kernel "
            "| < 1e-04 | missed |"
        ),
        "| goldens | tensorrt, fp32, `none` | no TensorRT | < 1e-04 | not here |",
        (
            "| DiT | XL/2 fp16, 1 images, pytorch none | 60.00 ms; steps full 3.000 ms | 2.00 GB "
            "| 0.40 x torch.compile |"
        ),
        "| DiT | 8 images, tensorrt | TensorRT is not installed |  | not measured |",
        "| DiT | 8 images, pytorch | ended by SIGKILL |  | failed |",
        "| targets | onnxruntime-cuda, 8 images: `none` / `fora:2` | 2.000 | >= 1.95 | met |",
        "| parts | goldens tensorrt | 3 s were left | 0 s | left out |",
    ):
        assert row in lines
    assert not any(line.startswith("| parts | kernel") for line in lines)


def test_a_dry_run_claims_no_gpu() -> None:
    assert table({**findings(), "dry": True}).startswith(
        "dry run on the CPU: no GPU numbers (2026-01-02)"
    )
