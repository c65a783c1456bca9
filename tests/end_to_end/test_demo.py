"""The shipped demo checkpoint draws digits that a classifier reads, with and without the cache."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

from tests.conftest import MNIST, Command
from tests.reference import relative_l2

LABELS = ",".join(str(digit) for digit in range(10))


def generated(
    engine: Path, command: Command, folder: Path, plan: str
) -> tuple[Path, np.ndarray, dict]:
    samples, latents, report = (
        folder / f"{plan.replace(':', '-')}{end}" for end in (".npz", ".npy", ".json")
    )
    options = ("--labels", LABELS, "--num-images", 100, "--seed", 7)
    command(
        "goc-run",
        engine,
        "--plan",
        plan,
        *options,
        "--output",
        samples,
        "--latents-output",
        latents,
        "--report",
        report,
    )
    return samples, np.load(latents), json.loads(report.read_text())


def test_digits_are_read_and_the_gradient_stays_closer_than_plain_reuse(
    demo_engine: Path, command: Command, tmp_path: Path
) -> None:
    errors, expected = {}, np.empty(0)
    for plan in ("none", "fora:2", "fora:2+gc:1.0"):
        samples, latents, report = generated(demo_engine, command, tmp_path, plan)
        expected = latents if plan == "none" else expected
        errors[plan] = relative_l2(latents, expected)
        assert report["computed_units"] / report["all_units"] == (1.0 if plan == "none" else 0.5)
        with np.load(samples) as found:
            assert found["arr_0"].shape == (100, 28, 28, 3)
        score = subprocess.run(
            [sys.executable, MNIST / "score.py", samples, "--labels", LABELS, "--minimum", "0.95"],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert score.returncode == 0, score.stdout + score.stderr
    assert errors["fora:2+gc:1.0"] < 0.8 * errors["fora:2"]


def test_the_checkpoint_is_small_and_deep_enough_to_be_worth_caching(demo_engine: Path) -> None:
    model = json.loads((demo_engine / "manifest.json").read_text())["model"]
    assert (MNIST / "dit_mnist.pt").stat().st_size < 15e6
    assert model["depth"] >= 8
    assert model["grid"] * model["patch"] >= 28


def test_a_searched_router_reuses_the_asked_share_at_odd_steps_and_less_at_a_lower_threshold(
    golden_engine: Path, command: Command, tmp_path: Path
) -> None:
    engine, router = tmp_path / "engine", tmp_path / "router.pt"
    shutil.copytree(golden_engine, engine)
    search = [sys.executable, MNIST / "search_router.py", engine, router, "--images", 2]
    subprocess.run([str(word) for word in search], check=True, timeout=120, capture_output=True)
    reused = {}
    for threshold in ("0.05", "0.1"):
        spec, title = f"l2c:{router}@{threshold}", f"searched-{threshold}"
        name = command("goc-plan", engine, spec, "--name", title).stdout.strip()
        schedule = json.loads((engine / "schedules" / f"{name}.json").read_text())
        rows = [step.split() for step in schedule["actions"]]
        assert all(set(row) == {"C"} for row in rows[::2])
        reused[threshold] = sum(word != "C" for row in rows for word in row)
    assert reused["0.1"] == 0.25 * sum(len(row) for row in rows)
    assert 0 < reused["0.05"] < reused["0.1"]

    opposite = tmp_path / "opposite.json"
    swapped = [
        " ".join("C" if k % 2 == 0 or word != "C" else "R" for word in row)
        for k, row in enumerate(rows)
    ]
    opposite.write_text(json.dumps({**schedule, "actions": swapped, "predictors": {"R": [1.0]}}))
    other = command("goc-plan", engine, f"file:{opposite}", "--name", "opposite").stdout.strip()
    latents = {}
    for plan in ("none", name, other):
        path = tmp_path / f"{plan}.npy"
        command(
            "goc-run",
            engine,
            "--plan",
            plan,
            "--num-images",
            8,
            "--seed",
            5,
            "--latents-output",
            path,
        )
        latents[plan] = np.load(path)
    assert relative_l2(latents[name], latents["none"]) < relative_l2(
        latents[other], latents["none"]
    )
