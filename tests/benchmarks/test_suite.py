from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import peaks, report, scaling, suite
from tests.conftest import GOLDEN


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch.onnx about itself
def test_the_suite_measures_the_demo_model_and_the_report_shows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(suite, "DEMO", GOLDEN / "model.pt")
    monkeypatch.setattr(peaks, "SQUARES", (64,))
    monkeypatch.setattr(peaks, "COPY_BYTES", 2**20)
    out = tmp_path / "performance"
    only = "pytorch,one graph,ours,diffusers"
    arguments = [
        "--rounds",
        "1",
        "--steps",
        "20",
        "--threads",
        "2",
        "--only",
        only,
        "--output",
        str(out),
    ]
    assert suite.main(arguments) == 0
    assert "ours none" in capsys.readouterr().out
    found = json.loads((out / "demo-batch-1.json").read_text())
    assert "diffusers" in next(iter(found["skipped"]))
    assert str(tmp_path) not in json.dumps(found)
    for name in ("one graph none", "ours none", "ours fora:2", "ours fora:2+gc:1.2"):
        assert found["contenders"][name]["relative_l2_to_twin"] < 1e-4, name
    assert found["contenders"]["ours l2c-like"]["step_ms_by_kind"].keys() == {
        "full",
        "mixed",
        "collapsed",
    }
    assert (
        found["cache"]["fora:2+gc:1.2"]["cache_bytes"]
        < found["cache"]["fora:2+gc:1.2"]["naive_cache_bytes"]
    )
    assert found["load"]["resident_bytes"] > 0

    document = tmp_path / "performance.md"
    document.write_text("kept\n<!-- begin results -->\nold\n<!-- end results -->\nkept too\n")
    assert report.main([str(document)]) == 0
    text = document.read_text()
    assert text.startswith("kept\n")
    assert text.endswith("kept too\n")
    assert "old" not in text
    assert "| `ours fora:2` |" in text
    assert (out / "totals.png").stat().st_size > 1000


def test_a_block_without_markers_is_an_error() -> None:
    with pytest.raises(ValueError, match="0 blocks named results"):
        report.with_blocks("no markers", {"results": "x"})


def test_fits_recover_a_known_growth() -> None:
    points = [
        {"value": n, "quadratic_ms": 3.0 * n**2, "line_ms": 5.0 + 2 * n} for n in (1, 2, 4, 8)
    ]
    found = scaling.fits(points)
    assert found["quadratic_ms"]["exponent"] == pytest.approx(2)
    assert (found["line_ms"]["intercept_ms"], found["line_ms"]["slope_ms"]) == (
        pytest.approx(5),
        pytest.approx(2),
    )


@pytest.mark.slow
def test_scaling_runs_and_its_report_has_a_row_per_axis(tmp_path: Path) -> None:
    tiny = [
        "--depth",
        "1",
        "--grid",
        "4",
        "--batch",
        "1,2",
        "--steps",
        "4,6",
        "--hidden",
        "32",
        "--heads",
        "2",
    ]
    base = ["--base-depth", "1", "--base-grid", "4", "--base-steps", "4", "--rounds", "1"]
    assert scaling.main([*tiny, *base, "--output", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "scaling.json").read_text())
    assert found["curves"].keys() == {"depth", "tokens", "batch", "steps"}
    assert report.scaling_table(found).count("full_step_ms") == 4
    report.plot_scaling(found, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").stat().st_size > 1000
