from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import roofline
from benchmarks.on_gpu.comparison import compared, known_peaks
from tests.benchmarks.on_gpu.findings import findings


@pytest.mark.parametrize(
    ("card", "known"),
    [
        ("NVIDIA H100 80GB HBM3", ["H100 SXM datasheet", "measured ceilings"]),
        ("NVIDIA H100 PCIe", ["measured ceilings"]),
        ("NVIDIA L40S", ["L40S datasheet", "measured ceilings"]),
        ("NVIDIA GeForce RTX 4090", ["RTX 4090 datasheet", "measured ceilings"]),
        ("NVIDIA RTX A4000", ["measured ceilings"]),
    ],
)
def test_peaks_are_those_of_this_card(card: str, known: list[str]) -> None:
    assert [gpu.name for gpu in known_peaks({**findings(), "machine": {"card": card}})] == known


def test_predictions_stand_beside_measurements(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "found.json"
    path.write_text(json.dumps(findings()))
    assert roofline.main(["--measured", str(path)]) == 0
    text = capsys.readouterr().out
    assert (
        "predicted, H100 SXM datasheet | predicted, measured ceilings | measured, onnxruntime-cuda"
        in text
    )
    (full,) = [
        line for line in text.splitlines() if line.startswith("| full step, `none` | 0.60 ms")
    ]
    assert "| 1.00 ms (" in full
    assert text.count("| total, `fora:2+gc:1.2` |") == 2  # one and eight images


def test_a_dry_run_has_nothing_to_compare() -> None:
    with pytest.raises(ValueError, match="dry run"):
        compared({**findings(), "dry": True})
    with pytest.raises(ValueError, match="no peaks are known"):
        compared({**findings(), "machine": {"card": "NVIDIA T4"}, "ceilings": None})
