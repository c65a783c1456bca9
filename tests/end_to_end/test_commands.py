"""goc-export, goc-plan, goc-run and goc-bench as a user meets them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import BIN, GOLDEN, Command

COMMANDS = ("goc-export", "goc-plan", "goc-run", "goc-serve", "goc-bench", "goc-eval")


@pytest.fixture
def engine(golden_engine: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(golden_engine, tmp_path / "engine"))


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_an_example_and_needs_no_heavy_import(name: str, command: Command) -> None:
    assert "Example" in command(name, "--help").stdout
    module = f"goc_deploy.cli.{name.removeprefix('goc-')}"
    heavy = (
        "[m for m in ('torch', 'onnx', 'onnxruntime', 'numpy', 'PIL', 'rich', 'matplotlib') "
        "if m in sys.modules]"
    )
    code = f"import sys; from {module} import main; main(['--help']); print('heavy', {heavy})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.rstrip().endswith("heavy []"), done.stdout + done.stderr


def test_plans_are_added_listed_shown_and_run_without_a_new_export(
    engine: Path, command: Command, tmp_path: Path
) -> None:
    assert (
        command(
            "goc-plan", engine, "fora:3+gc:0.8,history=computed", "--steps", "12"
        ).stdout.strip()
        == "fora-3+gc-0.8,history=computed"
    )
    assert (
        command(
            "goc-plan", engine, "none", "--steps", "50", "--sampler", "ddim:1", "--name", "slow"
        ).stdout.strip()
        == "slow"
    )
    listed = command("goc-plan", engine, "--list").stdout
    assert "slow" in listed
    assert "ddim:1" in listed
    shown = command(
        "goc-plan",
        engine,
        "--show",
        "fora:3+gc:0.8,history=computed",
        "--plot",
        tmp_path / "plot.png",
    ).stdout
    assert "8 gradient" in shown
    with Image.open(tmp_path / "plot.png") as picture:
        assert min(picture.size) > 200
    report = tmp_path / "r.json"
    command(
        "goc-run",
        engine,
        "--plan",
        "fora:3+gc:0.8,history=computed",
        "--labels",
        "1,2",
        "--report",
        report,
    )
    assert json.loads(report.read_text())["step_kinds"] == {"collapsed": 8, "full": 4}
    command(
        "goc-run",
        engine,
        "--plan",
        "slow",
        "--num-images",
        "2",
        "--latents-output",
        tmp_path / "a.npy",
    )
    command(
        "goc-run",
        engine,
        "--plan",
        "slow",
        "--num-images",
        "2",
        "--latents-output",
        tmp_path / "b.npy",
        "--batch-size",
        "1",
    )
    np.testing.assert_allclose(
        np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy"), rtol=1e-3, atol=1e-4
    )


def test_another_sampler_is_a_plan_of_the_same_engine(
    engine: Path, command: Command, tmp_path: Path
) -> None:
    for sampler, name in (("dpm++", "fast"), ("ddpm@leading", "ancestral")):
        command(
            "goc-plan", engine, "fora:2+gc:1.0", "--steps", 8, "--sampler", sampler, "--name", name
        )
        report = tmp_path / f"{name}.json"
        command("goc-run", engine, "--plan", name, "--labels", "3", "--report", report)
        assert json.loads(report.read_text())["sampler"] == sampler


def test_calibrated_plans_say_what_they_were_learned_from(
    engine: Path, command: Command, tmp_path: Path
) -> None:
    learning = ("--calibrate", 3, "--seed", 5, "--cfg-scale", 2, "--steps", 8)
    for spec in ("fora:2+goc", "smoothcache:0.3+fit"):
        command("goc-plan", engine, spec, *learning)
        command("goc-plan", engine, spec, *learning)  # the same again is no conflict
    shown = command(
        "goc-plan", engine, "--show", "fora:2+goc", "--plot", tmp_path / "god.png"
    ).stdout
    assert "N inverse" in shown
    assert "god: eta" in shown
    assert "images 3, seed 5, cfg_scale 2" in shown
    assert "threshold 2.000: error" in shown
    with Image.open(tmp_path / "god.png") as picture:
        assert min(picture.size) > 200
    written = tmp_path / "smooth.json"
    shown = command(
        "goc-plan", engine, "--show", "smoothcache:0.3+fit", "--smoothcache", written
    ).stdout
    assert "fit: entries 2, granularity step" in shown
    assert [len(actions) for actions in json.loads(written.read_text()).values()] == [8, 8]
    done = command("goc-plan", engine, "--list", "--calibrate", 3, code=2)
    assert "--calibrate goes with a SPEC" in done.stderr
    done = command("goc-plan", engine, "--list", "--smoothcache", written, code=2)
    assert "--plot and --smoothcache go with --show NAME" in done.stderr


def test_an_export_calibrates_its_default_plan(command: Command, tmp_path: Path) -> None:
    model = (
        GOLDEN / "model.pt",
        "-o",
        tmp_path / "engine",
        "--num-heads",
        4,
        "--calibrate",
        2,
        "--steps",
        6,
    )
    command("goc-export", *model)
    assert "is up to date" in command("goc-export", *model).stderr
    schedule = json.loads((tmp_path / "engine" / "schedules" / "fora-2+goc.json").read_text())
    assert schedule["provenance"]["god"]["calibration"]["images"] == 2
    manifest = json.loads((tmp_path / "engine" / "manifest.json").read_text())
    assert [plan["name"] for plan in manifest["plans"]] == ["none", "fora-2+goc"]
    command("goc-run", tmp_path / "engine", "--labels", "1", "--latents-output", tmp_path / "x.npy")


def test_a_hand_edited_schedule_runs(engine: Path, command: Command, tmp_path: Path) -> None:
    schedule = tmp_path / "mine.json"
    text = (engine / "schedules" / "fora-2.json").read_text()
    schedule.write_text(text.replace("R R R R R R R R", "R C R R R R C R", 1))
    command("goc-plan", engine, f"file:{schedule}")
    report = tmp_path / "r.json"
    command("goc-run", engine, "--plan", "file-mine", "--labels", "3", "--report", report)
    assert json.loads(report.read_text())["step_kinds"] == {"collapsed": 9, "full": 10, "mixed": 1}


def test_adding_the_same_plan_again_is_no_conflict_but_another_of_that_name_is(
    engine: Path, command: Command
) -> None:
    done = command("goc-plan", engine, "fora:2")
    assert done.stdout == "fora-2\n"
    assert (
        "fora:2: 20 steps of ddim (10 collapsed, 10 full), 80 of 160 units computed" in done.stderr
    )
    before = (engine / "manifest.json").read_bytes()
    done = command("goc-plan", engine, "fora:2", "--steps", "10", code=8)
    assert "already has another plan named fora-2; choose another --name" in done.stderr
    assert (engine / "manifest.json").read_bytes() == before


def test_bench_compares_plans_and_writes_json_and_a_plot(
    engine: Path, command: Command, tmp_path: Path
) -> None:
    out, plot = tmp_path / "bench.json", tmp_path / "bench.png"
    done = command(
        "goc-bench",
        engine,
        "--plan",
        "none",
        "--plan",
        "fora:2",
        "--repeats",
        2,
        "--json",
        out,
        "--plot",
        plot,
    )
    assert "speed-up" in done.stdout
    found = json.loads(out.read_text())
    assert found["plans"]["none"]["step_ms_by_kind"].keys() == {"full"}
    assert len(found["plans"]["fora-2"]["step_ms"]) == 20
    assert len(found["plans"]["fora-2"]["total_ms_rounds"]) == 2
    with Image.open(plot) as picture:
        assert min(picture.size) > 200


def test_bench_writes_a_trace_of_one_more_run_of_each_plan(
    engine: Path, command: Command, tmp_path: Path
) -> None:
    out, trace = tmp_path / "bench.json", tmp_path / "trace.json"
    plans = ("--plan", "none", "--plan", "fora:2")
    done = command("goc-bench", engine, *plans, "--repeats", 1, "--json", out, "--profile", trace)
    assert (
        "between" in done.stdout
    )  # the rest of the heading is on the next line where the times are long
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e["ph"] == "X"]
    for pid, kinds in ((0, ["full"] * 20), (1, ["full", "collapsed"] * 10)):
        steps = [e["name"] for e in events if e["pid"] == pid and e["cat"] == "step"]
        assert steps == [f"step {k} ({kind})" for k, kind in enumerate(kinds)]
    launched = [e["name"] for e in events if e["pid"] == 1 and e["cat"] == "launch"]
    assert launched.count("block_03_mlp") == launched.count("collect") == 10
    profile_ms = json.loads(out.read_text())["plans"]["fora-2"]["profile_ms"]
    assert {
        "attn",
        "mlp",
        "predict ahead",
        "collect",
        "conditioning",
        "between launches",
    } <= profile_ms.keys()


def test_labels_are_repeated_up_to_num_images(
    engine: Path, command: Command, tmp_path: Path
) -> None:
    command(
        "goc-run",
        engine,
        "--labels",
        "1,2",
        "--num-images",
        "5",
        "--latents-output",
        tmp_path / "x.npy",
    )
    assert np.load(tmp_path / "x.npy").shape == (5, 4, 8, 8)


def test_data_goes_to_stdout_and_messages_to_stderr(
    engine: Path, command: Command, tmp_path: Path
) -> None:
    done = command("goc-run", engine, "--labels", "1", "--latents-output", tmp_path / "x.npy")
    assert done.stdout == f"{tmp_path / 'x.npy'}\n"
    assert "\x1b" not in done.stdout + done.stderr


def test_guidance_on_no_channel_is_no_guidance(
    engine: Path, command: Command, tmp_path: Path
) -> None:
    outputs = []
    for words in ((), ("--cfg-channels", 0), ("--cfg-scale", 1)):
        out = tmp_path / "x.npy"
        command("goc-run", engine, "--labels", "1", *words, "--latents-output", out)
        outputs.append(np.load(out))
    guided, on_no_channel, none = outputs
    np.testing.assert_allclose(on_no_channel, none, atol=1e-5)
    assert np.abs(guided - none).max() > 1e-2


def test_an_export_takes_the_prediction_that_it_is_told(command: Command, tmp_path: Path) -> None:
    model = (GOLDEN / "model.pt", "-o", tmp_path / "engine", "--num-heads", 4)
    command("goc-export", *model, "--prediction", "v", "--plan", "none", "--steps", 2)
    manifest = json.loads((tmp_path / "engine" / "manifest.json").read_text())
    assert manifest["model"]["prediction_type"] == "v"


def test_a_closed_pipe_is_no_error(engine: Path) -> None:
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {BIN / 'goc-plan'} {engine} --list | true"],
        capture_output=True,
        text=True,
    )
    assert "Traceback" not in done.stderr
    assert done.returncode == 0, done.stderr


def test_half_precision_engines_run_close_to_float32(
    command: Command, golden: dict[str, np.ndarray], tmp_path: Path
) -> None:
    np.save(tmp_path / "noise.npy", golden["noise"])
    command(
        "goc-export",
        GOLDEN / "model.pt",
        "-o",
        tmp_path / "half",
        "--num-heads",
        4,
        "--precision",
        "fp16",
        "--plan",
        "fora:2+gc:1.2",
    )
    arguments = (
        "--labels",
        "1,7,4",
        "--cfg-scale",
        "2.0",
        "--latents",
        tmp_path / "noise.npy",
        "--latents-output",
        tmp_path / "x.npy",
    )
    command("goc-run", tmp_path / "half", *arguments)
    expected = golden["fora_50_gc"][-1]
    assert np.linalg.norm(np.load(tmp_path / "x.npy") - expected) / np.linalg.norm(expected) < 2e-2


def test_bf16_engines_export_and_say_that_the_cpu_cannot_run_them(
    command: Command, tmp_path: Path
) -> None:
    done = command(
        "goc-export",
        GOLDEN / "model.pt",
        "-o",
        tmp_path / "bf16",
        "--num-heads",
        4,
        "--precision",
        "bf16",
        "--plan",
        "fora:2",
    )
    assert "bf16" in done.stderr
    done = command("goc-run", tmp_path / "bf16", "--labels", "1", code=5)
    assert "no CPU kernel" in done.stderr
