"""The installed command line reproduces the reference's trajectories."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from goc_deploy.policies.grammar import parse_policy
from tests.conftest import GOLDEN_PLANS, Command
from tests.reference import relative_l2, worst_step


@pytest.fixture(scope="module")
def noise_file(tmp_path_factory: pytest.TempPathFactory, golden: dict[str, np.ndarray]) -> Path:
    path = tmp_path_factory.mktemp("noise") / "noise.npy"
    np.save(path, golden["noise"])
    return path


@pytest.mark.parametrize("spec", GOLDEN_PLANS)
def test_every_step_of_every_golden_trajectory(
    golden_engine: Path,
    noise_file: Path,
    golden: dict[str, np.ndarray],
    command: Command,
    tmp_path: Path,
    spec: str,
) -> None:
    out, report = tmp_path / "x.npy", tmp_path / "report.json"
    command(
        *("goc-run", golden_engine, "--plan", spec, "--labels", "1,7,4", "--cfg-scale", "2.0"),
        *("--latents", noise_file, "--trajectory-output", out, "--report", report),
    )
    found = np.load(out)
    assert found.shape == golden["no_cache"].shape
    assert worst_step(found, golden[GOLDEN_PLANS[spec]]) < 1e-4
    assert json.loads(report.read_text())["policy"] == parse_policy(spec).recorded


@pytest.mark.parametrize("size", [1, 2, 3])
def test_batch_sizes_give_the_same_images(
    golden_engine: Path,
    noise_file: Path,
    golden: dict[str, np.ndarray],
    command: Command,
    tmp_path: Path,
    size: int,
) -> None:
    out = tmp_path / "x.npy"
    arguments = (
        "--labels",
        "1,7,4",
        "--cfg-scale",
        "2.0",
        "--latents",
        noise_file,
        "--latents-output",
        out,
    )
    command("goc-run", golden_engine, "--plan", "fora:2+gc:1.2", "--batch-size", size, *arguments)
    assert relative_l2(np.load(out), golden["fora_50_gc"][-1]) < 1e-5


def test_the_cached_plans_are_as_far_from_no_cache_as_the_reference_says(
    golden: dict[str, np.ndarray],
) -> None:
    errors = {
        name: relative_l2(golden[name][-1], golden["no_cache"][-1])
        for name in ("fora_50", "fora_50_gc", "fora_50_goc")
    }
    assert errors == pytest.approx(
        {"fora_50": 0.0436, "fora_50_gc": 0.0121, "fora_50_goc": 0.0199}, abs=1e-4
    )


def test_latents_without_a_decoder_say_so(
    golden_engine: Path, command: Command, tmp_path: Path
) -> None:
    done = command("goc-run", golden_engine, "--labels", "1", "--output", tmp_path / "x.png")
    assert "4-channel latents, which need a VAE" in done.stderr
    assert not (tmp_path / "x.png").exists()
    assert np.load(tmp_path / "x.npy").shape == (1, 4, 8, 8)
