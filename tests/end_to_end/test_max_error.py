"""Engine directories in which as many units are quantised as a bound of the error allows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from goc_deploy import load
from goc_deploy.api.exporting import export_with
from goc_deploy.engine_dir.reading import read_manifest
from goc_deploy.errors import UsageError, VerificationError
from goc_deploy.options import ExportOptions
from goc_deploy.precision import WeightFormat
from tests.conftest import GOLDEN, Command

OPTIONS = ExportOptions(num_heads=4, plans=("none", "fora:2+gc:1.2"), calibrate=2, cfg_scale=2.0)


def budget_of(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = read_manifest(path).provenance["quantization"]["budget"]
    return found


def digests(path: Path) -> dict[str, str]:
    return {file.path: file.sha256 for file in read_manifest(path).files}


@pytest.mark.parametrize("quantize", ["w4", "int8"])
def test_some_units_are_quantised_and_the_rest_is_as_it_was(
    quantize: WeightFormat, golden_engine: Path, tmp_path: Path, command: Command
) -> None:
    path, loose = tmp_path / "engine", tmp_path / "loose"
    options = replace(OPTIONS, quantize=(quantize,))
    manifest, _ = export_with(GOLDEN / "model.pt", loose, replace(options, max_error=10.0))
    units = set(manifest.model.unit_names)
    measured = budget_of(loose)
    assert set(measured["formats"]) == set(measured["alone"]) == units
    assert not (loose / "variants").exists()
    # A bound between the error of the plan alone and that with all units leaves some out.
    judge = str(measured["judge"])
    bound = (measured["cached"][judge] + measured["total"][judge]) / 2
    manifest, _ = export_with(GOLDEN / "model.pt", path, replace(options, max_error=bound))
    budget = budget_of(path)
    assert 0 < len(budget["formats"]) < len(units)
    assert all(error <= bound for error in budget["total"].values())
    formats = {unit.name: unit.weight_format for unit in manifest.graphs}
    assert {name: found for name, found in formats.items() if found} == budget["formats"]
    ours, full, all_quantised = map(digests, (path, golden_engine, loose))
    for unit in units:
        expected = all_quantised if formats[unit] else full
        for file in (f"onnx/{unit}.onnx", f"onnx/{unit}.weights"):
            assert ours[file] == expected[file]
    assert not any(name.startswith("variants") for name in ours)
    assert not export_with(GOLDEN / "model.pt", path, replace(options, max_error=bound))[1]
    shown = command("goc-plan", path, "--inspect").stdout
    assert f"bound {bound:.3g}" in shown


def test_each_unit_gets_one_of_several_formats(tmp_path: Path, command: Command) -> None:
    """Weights of 4 bits where they fit; else products of int8, whose ranges are calibrated."""
    path = tmp_path / "engine"
    options = replace(OPTIONS, quantize=("w4", "int8"))
    manifest, _ = export_with(GOLDEN / "model.pt", path, replace(options, max_error=0.05))
    budget = budget_of(path)
    formats = {u.name: u.weight_format for u in manifest.graphs if u.weight_format is not None}
    assert formats == budget["formats"]
    assert set(formats.values()) == {"w4", "int8"}
    assert all(error <= 0.05 for error in budget["total"].values())
    assert {*budget["alone"]["block_00_mlp"]} == {"w4", "int8"}
    of_int8 = {unit for unit, found in formats.items() if found == "int8"}
    assert manifest.provenance["quantization"]["units"].keys() == of_int8
    with load(path, plan="fora:2+gc:1.2") as pipe:
        latents = pipe.generate(labels=[0], seed=1).latents
    assert np.isfinite(latents).all()
    shown = command("goc-plan", path, "--inspect").stdout
    assert "alone in w4" in shown
    assert "alone in int8" in shown


def test_what_cannot_be_met_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    options = replace(OPTIONS, quantize=("w8",), max_error=1e-6)
    message = r"`max_error=1e-06` cannot be met: plan fora-2\+gc-1.2 has error 0.\d+"
    with pytest.raises(VerificationError, match=message):
        export_with(GOLDEN / "model.pt", tmp_path / "engine", options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (replace(OPTIONS, max_error=0.1), "`max_error` needs `quantize`"),
        (
            replace(OPTIONS, max_error=0.1, quantize=("w8",), quantize_exclude=("*",)),
            "`max_error` needs `quantize`, and units that it does not exclude",
        ),
        (
            replace(OPTIONS, max_error=0.1, quantize=("w8",), precision="bf16"),
            "no kernels for bf16",
        ),
    ],
)
def test_wrong_options_are_refused(options: ExportOptions, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        export_with(GOLDEN / "model.pt", tmp_path / "engine", options)
