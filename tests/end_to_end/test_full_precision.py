"""Policies that learn on quantised weights, and are compared with images in full precision."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from goc_deploy.api.engines import cpu_backend
from goc_deploy.api.exporting import export_with
from goc_deploy.api.laboratory import EngineLaboratory
from goc_deploy.api.plans import compiled_plan
from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.engine_dir.manifest import Manifest
from goc_deploy.errors import UsageError
from goc_deploy.options import ExportOptions, PlanOptions, no_progress
from goc_deploy.policies.calibration import CalibrationOptions
from goc_deploy.policies.candidates import uncached
from goc_deploy.policies.head import HeadOptions
from tests.conftest import GOLDEN, Command

IMAGES = CalibrationOptions(images=2, seed=3, cfg_scale=2.0)
STEPS = 4


@pytest.fixture(scope="module")
def w4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("w4") / "engine"
    options = ExportOptions(num_heads=4, plans=("none",), steps=STEPS, quantize=("w4",))
    export_with(GOLDEN / "model.pt", path, options)
    return path


def laboratory(path: Path, full_precision: Path | None) -> EngineLaboratory:
    full = None if full_precision is None else EngineDir.open(full_precision)
    return EngineLaboratory(EngineDir.open(path), cpu_backend, "ddim", IMAGES, no_progress, full)


def test_errors_contain_that_of_quantization_only_in_comparison_with_full_precision(
    w4: Path, golden_engine: Path
) -> None:
    no_cache = uncached(EngineDir.open(w4).manifest.model, STEPS)
    own, full = laboratory(w4, None), laboratory(w4, golden_engine)
    assert own.calibrator(STEPS).error(no_cache) == 0
    error = full.calibrator(STEPS).error(no_cache)
    assert 1e-3 < error < 0.5
    trials = full.trials()
    drawn, aim = trials.run(no_cache, IMAGES).latents, trials.aim(no_cache, IMAGES)
    assert np.linalg.norm(drawn - aim) / np.linalg.norm(aim) == pytest.approx(error, rel=1e-3)
    np.testing.assert_array_equal(own.trials().aim(no_cache, IMAGES), drawn)
    for learned in (full.calibrator(STEPS), trials):
        assert learned.describe()["aim"] == "full precision"
    assert "aim" not in own.calibrator(STEPS).describe()


def test_a_plan_records_what_it_was_compared_with(
    w4: Path, golden_engine: Path, command: Command
) -> None:
    arguments = ("fora:2+goc:1.0", "--calibrate", "2", "--name", "aimed")
    command("goc-plan", w4, *arguments, "--full-precision", golden_engine)
    god = json.loads((w4 / "schedules" / "aimed.json").read_text())["provenance"]["god"]
    assert god["calibration"]["aim"] == "full precision"
    assert min(measured["error"] for measured in god["measured"]) > 1e-3


def test_a_head_is_refused(w4: Path, golden_engine: Path) -> None:
    learns = laboratory(w4, golden_engine)
    with (
        pytest.raises(UsageError, match="its own engine directory; leave out `full_precision`"),
        learns.head_trials(HeadOptions(), 16),
    ):
        pass


def test_the_images_of_another_model_are_refused(w4: Path, golden_engine: Path) -> None:
    directory = EngineDir.open(w4)
    manifest: Manifest = directory.manifest
    other = replace(manifest, provenance={**manifest.provenance, "checkpoint_sha256": "0" * 64})
    options = PlanOptions(calibrate=2, full_precision=golden_engine)
    with pytest.raises(UsageError, match=r"holds another model.* without `quantize`"):
        compiled_plan(EngineDir(w4, other), "fora:2+goc:1.0", options, cpu_backend)
